// Voxels as a bitmap with ranks: whether a cell holds a voxel, and which.
//
// A voxel's place in the bitmap is linear in its coordinates, modulo the size of the bitmap, and
// 1 along the last axis. So an offset adds a constant to the place, and the offsets of a line
// (those that differ on the last axis only) are one window of bits. The bitmap has 44 to 88 bits per voxel
// however large the grid is; where the grid is larger, cells share a place, 1 to 3 % of the absent
// reads look present, and the line kept beside each voxel tells. Most reads are absent and cost a
// few instructions on bits that stay in cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "bits.h"
#include "coord_range.h"
#include "kernel_map.h"

namespace fquant {

constexpr int64_t kGrain = 2048;     // outputs whose windows are found before any is looked up
constexpr size_t kMostShared = 16;   // cells of one place, or the grid is left to sorting
constexpr int64_t kWindow = 57;      // bits that `bits_from` gives for sure

// Odd parts of a full circle, one per axis but the last: the lattice of cells that share a place
// must have no short vectors, or neighbors would be taken for each other.
constexpr uint32_t kStrides[kAxes] = {0x9e3779b9, 0xc2b2ae3d, 0x85ebca77, 0x27d4eb2f, 0x165667b1};

// Where the rows of both sides lie, and how coordinates become places and lines.
struct Frame {
  int axes;
  int place_bits;
  int64_t low[kAxes];      // of voxels and of all cells that are looked for
  uint32_t place[kAxes];   // strides of places, modulo 2^32
  uint32_t line[kAxes];    // strides of lines: the row-major index over all axes but the last
};

// False where there is no frame: a last axis of more than 4096 cells per voxel, 2^32 lines, or a
// processor that does not read windows of bits as `bits_from` does.
inline bool make_frame(const Range& voxels, const Range& wanted, int64_t count, Frame* frame) {
  if (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__) return false;
  __int128 lines = 1, last = 1;
  int64_t extent[kAxes];
  for (int a = 0; a < frame->axes; ++a) {
    frame->low[a] = std::min(voxels.low[a], wanted.low[a]);
    extent[a] = std::max(voxels.high[a], wanted.high[a]) - frame->low[a] + 1;
    if (a + 1 == frame->axes) {
      last = extent[a];
    } else if ((lines *= extent[a]) >= (int64_t{1} << 32)) {
      return false;
    }
  }
  const auto ceil_log2 = [](__int128 x) {
    int bits = 0;
    while ((static_cast<__int128>(1) << bits) < x) ++bits;
    return bits;
  };
  // At least one word, and no more than a dense box of all cells has.
  // Bits per voxel, submanifold maps of 86k / 89k / 110k voxels, ms (Zen 3, 512 kB of L2): 98 / 95 /
  // 76 bits 7.2 / 8.8 / 9.9, 49 / 47 / 38 bits 5.9 / 7.9 / 11.6. So 44 to 88.
  const int plenty = ceil_log2(static_cast<__int128>(count) * 44), dense = ceil_log2(lines * last);
  const int bits = std::max({6, std::min(plenty, dense), ceil_log2(last)});
  if (bits > std::min(31, plenty + 6)) return false;
  frame->place_bits = bits;
  uint32_t place = 1, line = 1;
  for (int a = frame->axes - 1; a >= 0; --a) {
    const bool is_last = a + 1 == frame->axes;
    frame->place[a] = is_last ? 1 : dense <= bits ? place : kStrides[a] >> (32 - bits) | 1;
    frame->line[a] = is_last ? 0 : line;
    place *= static_cast<uint32_t>(extent[a]);
    if (!is_last) line *= static_cast<uint32_t>(extent[a]);
  }
  return true;
}

// Rows as (place, line): what tells whether two rows are the same cell.
struct Rows {
  std::unique_ptr<uint32_t[]> place, line;
};

// The cell of row i is coords[i] * stride - padding, or coords[i] where `g` is null.
template <class T>
Rows locate(const T* coords, int64_t count, const Frame& f, const Geometry* g) {
  Rows rows{std::unique_ptr<uint32_t[]>(new uint32_t[count]),
            std::unique_ptr<uint32_t[]>(new uint32_t[count])};
  uint32_t place_step[kAxes], line_step[kAxes], place0 = 0, line0 = 0;
  for (int a = 0; a < f.axes; ++a) {
    const int64_t stride = g != nullptr && a > 0 ? g->stride[a - 1] : 1;
    const int64_t padding = g != nullptr && a > 0 ? g->padding[a - 1] : 0;
    const uint32_t shift = static_cast<uint32_t>(-padding - f.low[a]);
    place_step[a] = f.place[a] * static_cast<uint32_t>(stride);
    line_step[a] = f.line[a] * static_cast<uint32_t>(stride);
    place0 += f.place[a] * shift;
    line0 += f.line[a] * shift;
  }
  const auto fill = [&](int axes) {
    for (int64_t i = 0; i < count; ++i) {
      uint32_t place = place0, line = line0;
      for (int a = 0; a < axes; ++a) {
        const uint32_t x = static_cast<uint32_t>(coords[i * axes + a]);
        place += x * place_step[a];
        line += x * line_step[a];
      }
      rows.place[i] = place;
      rows.line[i] = line;
    }
  };
  f.axes == 4 ? fill(4) : fill(f.axes);  // three dimensions: unrolled
  return rows;
}

// The input voxels: a bitmap over places, and per set bit the voxel that has it.
class Voxels {
 public:
  Voxels(const Rows& rows, int64_t count, int place_bits)
      : mask_((uint32_t{1} << place_bits) - 1), words_(int64_t{1} << (place_bits - 6)),
        bits_(words_ + 2, 0), before_(new int32_t[words_]), slots_(count + 64) {
    std::unique_ptr<int32_t[]> late(new int32_t[count]);  // rows that find their bit set
    int64_t num_late = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t place = rows.place[i] & mask_;
      uint64_t* word = &bits_[place >> 6];
      late[num_late] = static_cast<int32_t>(i);
      num_late += *word >> (place & 63) & 1;
      *word |= uint64_t{1} << (place & 63);
    }
    int32_t sum = 0;
    for (int64_t w = 0; w < words_; ++w) {
      before_[w] = sum;
      sum += count_bits(bits_[w]);
    }
    bits_[words_] = bits_[0];  // windows wrap around
    for (int64_t i = count; i-- > 0;) {  // the first row of a place is written last
      slots_[rank(rows.place[i])] = {rows.line[i], static_cast<int32_t>(i)};
    }
    late_rows(rows, late.get(), num_late);
    std::copy(slots_.begin(), slots_.begin() + std::min<int64_t>(sum, 64), slots_.begin() + sum);
  }

  bool unique() const { return unique_; }
  bool crowded() const { return crowded_; }
  uint64_t window(uint32_t place) const { return bits_from(bits_.data(), place & mask_); }

  // The search of a window's voxels, in steps that each ask for what the next one reads: many
  // searches go side by side, and waiting for memory one after the other is most of their time.
  void prepare(uint32_t place) const { __builtin_prefetch(&before_[(place & mask_) >> 6]); }
  int32_t rank(uint32_t place) const {
    const uint32_t at = place & mask_;
    const uint64_t below = (uint64_t{1} << (at & 63)) - 1;
    const int32_t slot = before_[at >> 6] + count_bits(bits_[at >> 6] & below);
    __builtin_prefetch(&slots_[slot]);
    return slot;
  }
  // The row of the cell on `line` whose bit is the rank-th one, or -1: another cell's bit.
  int32_t find(int64_t rank, uint32_t line) const {
    const Slot* slot = &slots_[rank];
    if (slot->row >= 0) return slot->line == line ? slot->row : -1;
    slot = &shared_[-2 - int64_t{slot->row}];
    while (slot->line != line && slot->row >= 0) ++slot;
    return slot->row;
  }

 private:
  struct Slot {
    uint32_t line;
    int32_t row;  // or -2 - i, where several cells have the place and shared_[i] is the first
  };

  // Gives rows that found their bit set the slots after the first row's; row -1 ends them.
  void late_rows(const Rows& rows, const int32_t* late, int64_t count) {
    std::vector<std::pair<int32_t, int32_t>> by_slot;
    for (int64_t n = 0; n < count; ++n) by_slot.push_back({rank(rows.place[late[n]]), late[n]});
    std::sort(by_slot.begin(), by_slot.end());
    for (size_t n = 0; n < by_slot.size();) {
      const int32_t at = by_slot[n].first;
      const size_t begin = shared_.size();
      shared_.push_back(slots_[at]);
      for (; n < by_slot.size() && by_slot[n].first == at; ++n) {
        const uint32_t line = rows.line[by_slot[n].second];
        const auto same = [&](const Slot& slot) { return slot.line == line; };
        if (std::any_of(shared_.begin() + begin, shared_.end(), same)) {
          unique_ = false;  // the first row of a cell counts
        } else {
          shared_.push_back({line, by_slot[n].second});
        }
        if (shared_.size() - begin > kMostShared) crowded_ = true;
        if (crowded_) return;
      }
      if (shared_.size() == begin + 1) {
        shared_.pop_back();
        continue;
      }
      slots_[at].row = -2 - static_cast<int32_t>(begin);
      shared_.push_back({0, -1});
    }
  }
  uint32_t mask_;
  int64_t words_;
  std::vector<uint64_t> bits_;  // and one word more, the first again, and one to read past
  std::unique_ptr<int32_t[]> before_;
  std::vector<Slot> slots_;  // and the first ones again
  std::vector<Slot> shared_;
  bool unique_ = true, crowded_ = false;
};

}  // namespace fquant
