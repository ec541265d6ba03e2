// The box around rows of coordinates.
#pragma once

#include <cstdint>

namespace fquant {

constexpr int kMaxDims = 4;
constexpr int kAxes = 1 + kMaxDims;  // the batch is the first axis

struct Range {
  int64_t low[kAxes], high[kAxes];
};

// Of at least one row.
template <class T>
Range range_of(const T* coords, int64_t count, int axes);

}  // namespace fquant
