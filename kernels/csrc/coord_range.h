// The box around rows of coordinates.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fquant {

constexpr int kAxes = 9;  // at most; the batch is the first axis

struct Range {
  int64_t low[kAxes], high[kAxes];
};

// All axes at once: one pass over the rows, and minima of four axes in one register. Two rows at a
// time, which do not wait for each other.
template <class T>
Range range_of(const T* coords, int64_t count, int axes) {
  T low[2][kAxes], high[2][kAxes];
  for (int side = 0; side < 2; ++side) {
    std::copy(coords, coords + axes, low[side]);
    std::copy(coords, coords + axes, high[side]);
  }
  const auto add = [&](int side, const T* row, int of) {
    for (int a = 0; a < of; ++a) {
      low[side][a] = low[side][a] < row[a] ? low[side][a] : row[a];
      high[side][a] = high[side][a] > row[a] ? high[side][a] : row[a];
    }
  };
  const auto scan = [&](int of) {
    for (int64_t i = 0; i + 1 < count; i += 2) {
      add(0, coords + i * of, of);
      add(1, coords + (i + 1) * of, of);
    }
    add(0, coords + (count - 1) * of, of);
  };
  axes == 4 ? scan(4) : scan(axes);  // three dimensions: unrolled
  Range range;
  for (int a = 0; a < axes; ++a) {
    range.low[a] = std::min(low[0][a], low[1][a]);
    range.high[a] = std::max(high[0][a], high[1][a]);
  }
  return range;
}

}  // namespace fquant
