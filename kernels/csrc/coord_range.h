// The box around rows of coordinates.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fquant {

constexpr int kAxes = 9;  // at most; the batch is the first axis

struct Range {
  int64_t low[kAxes], high[kAxes];
};

// All axes at once: one pass over the rows, and minima of four axes in one register.
template <class T>
Range range_of(const T* coords, int64_t count, int axes) {
  T low[kAxes], high[kAxes];
  std::copy(coords, coords + axes, low);
  std::copy(coords, coords + axes, high);
  const auto scan = [&](int of) {
    for (int64_t i = 1; i < count; ++i) {
      for (int a = 0; a < of; ++a) {
        const T x = coords[i * of + a];
        low[a] = low[a] < x ? low[a] : x;
        high[a] = high[a] > x ? high[a] : x;
      }
    }
  };
  axes == 4 ? scan(4) : scan(axes);  // three dimensions: unrolled
  Range range;
  std::copy(low, low + axes, range.low);
  std::copy(high, high + axes, range.high);
  return range;
}

}  // namespace fquant
