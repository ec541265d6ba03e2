// Sorting of (key, row) pairs, and search in sorted keys from a place nearby.
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

namespace fquant {

inline int bit_width(uint64_t x) { return x == 0 ? 0 : 64 - __builtin_clzll(x); }

// Stable radix sort of the bits [low, low + bits) of each value, by at most 11 bits a pass.
inline void radix_sort(std::vector<uint64_t>* values, int low, int bits) {
  const int passes = (bits + 10) / 11;
  if (passes == 0 || values->size() < 2) return;
  const int width = (bits + passes - 1) / passes;
  const uint64_t mask = (uint64_t{1} << width) - 1;
  std::vector<int64_t> start(static_cast<size_t>(passes) << width, 0);
  for (const uint64_t value : *values) {
    for (int pass = 0; pass < passes; ++pass) {
      ++start[(static_cast<uint64_t>(pass) << width) + (value >> (low + pass * width) & mask)];
    }
  }
  std::vector<uint64_t> other(values->size());
  for (int pass = 0; pass < passes; ++pass) {
    int64_t* place = &start[static_cast<size_t>(pass) << width];
    int64_t sum = 0;
    for (uint64_t digit = 0; digit <= mask; ++digit) sum += std::exchange(place[digit], sum);
    for (const uint64_t value : *values) {
      other[place[value >> (low + pass * width) & mask]++] = value;
    }
    values->swap(other);
  }
}

// Sorts keys; `row` becomes the position each sorted key had. Equal keys keep their order.
inline void sort_keys(std::vector<uint64_t>* keys, std::vector<int32_t>* row) {
  const size_t count = keys->size();
  row->resize(count);
  for (size_t i = 0; i < count; ++i) (*row)[i] = static_cast<int32_t>(i);
  if (std::is_sorted(keys->begin(), keys->end())) return;

  const auto [least, most] = std::minmax_element(keys->begin(), keys->end());
  const uint64_t base = *least;
  const int key_bits = bit_width(*most - base), row_bits = bit_width(count - 1);
  if (key_bits + row_bits <= 64) {
    // Key and row in one word: eight bytes to move instead of sixteen.
    std::vector<uint64_t>& packed = *keys;
    for (size_t i = 0; i < count; ++i) packed[i] = (packed[i] - base) << row_bits | i;
    radix_sort(&packed, row_bits, key_bits);
    const uint64_t mask = (uint64_t{1} << row_bits) - 1;
    for (size_t i = 0; i < count; ++i) {
      (*row)[i] = static_cast<int32_t>(packed[i] & mask);
      packed[i] = (packed[i] >> row_bits) + base;
    }
    return;
  }
  std::vector<std::pair<uint64_t, int32_t>> pairs(count);
  for (size_t i = 0; i < count; ++i) pairs[i] = {(*keys)[i], (*row)[i]};
  std::sort(pairs.begin(), pairs.end());
  for (size_t i = 0; i < count; ++i) std::tie((*keys)[i], (*row)[i]) = pairs[i];
}

// Sorts keys and drops repeated ones.
inline void sort_unique(std::vector<uint64_t>* keys) {
  if (!std::is_sorted(keys->begin(), keys->end())) {
    const auto [least, most] = std::minmax_element(keys->begin(), keys->end());
    const uint64_t base = *least;
    const int bits = bit_width(*most - base);
    for (uint64_t& key : *keys) key -= base;
    radix_sort(keys, 0, bits);
    for (uint64_t& key : *keys) key += base;
  }
  keys->erase(std::unique(keys->begin(), keys->end()), keys->end());
}

// First place whose key is not below `wanted`, looking from `place`: in a sweep it is close by.
inline int64_t seek(const int64_t* keys, int64_t count, int64_t place, int64_t wanted) {
  for (int i = 0; i < 8; ++i) {
    if (place == count || keys[place] >= wanted) {
      if (place == 0 || keys[place - 1] < wanted) return place;
      return std::lower_bound(keys, keys + place, wanted) - keys;
    }
    ++place;
  }
  int64_t step = 8, low = place;
  while (low + step < count && keys[low + step] < wanted) {
    low += step;
    step *= 2;
  }
  const int64_t high = std::min(count, low + step);
  return std::lower_bound(keys + std::min(low, count), keys + high, wanted) - keys;
}

}  // namespace fquant
