// Many voxels looked up at once: which rows are at given offsets from given cells.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bits.h"
#include "voxel_bitmap.h"

namespace fquant {

// Offsets along the last axis that one window of bits tells of: their bits, rising from 0, and their
// taps.
struct Window {
  int64_t count = 0;
  int64_t bit[kWindow], tap[kWindow];

  void add(int64_t b, int64_t t) { bit[count] = b, tap[count++] = t; }
};

// Calls found(tap, i, row) for every voxel in the windows of cells i < count <= kGrain: cell i's
// begins at places[i] + place, on line lines[i] + line. Calls of one tap are in the order of cells.
// Bits are appended to lists without a branch, which would be mispredicted often; then what is
// present is found.
template <class Found>
void look_up(const Voxels& voxels, const uint32_t* places, uint32_t place, const uint32_t* lines,
             uint32_t line, int64_t count, const Window& w, const Found& found) {
  uint64_t windows[kGrain], mask = 0;
  uint16_t some[kGrain];  // cells whose window is not empty
  int32_t ranks[kGrain];
  struct Hit {
    int32_t rank, cell;
  } hits[kGrain];
  for (int64_t n = 0; n < w.count; ++n) mask |= uint64_t{1} << w.bit[n];
  int64_t num_some = 0;
  for (int64_t i = 0; i < count; ++i) {
    windows[i] = voxels.window(places[i] + place);
    some[num_some] = static_cast<uint16_t>(i);
    num_some += (windows[i] & mask) != 0;
  }
  for (int64_t n = 0; n < num_some; ++n) voxels.prepare(places[some[n]] + place);
  for (int64_t n = 0; n < num_some; ++n) ranks[n] = voxels.rank(places[some[n]] + place);
  for (int64_t t = 0; t < w.count; ++t) {
    const int64_t bit = w.bit[t], next = t + 1 < w.count ? w.bit[t + 1] : bit + 1;
    const uint64_t between = (uint64_t{1} << (next - bit)) - 1;
    int64_t num_hits = 0;
    for (int64_t n = 0; n < num_some; ++n) {
      const uint64_t window = windows[some[n]] >> bit;
      hits[num_hits] = {ranks[n], some[n]};
      num_hits += window & 1;
      ranks[n] += count_bits(window & between);
    }
    for (int64_t h = 0; h < num_hits; ++h) {
      const int32_t row = voxels.find(hits[h].rank, lines[hits[h].cell] + line);
      if (row >= 0) found(w.tap[t], hits[h].cell, row);
    }
  }
}

}  // namespace fquant
