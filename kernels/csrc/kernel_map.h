// The methods of kernel maps, and what they share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "coord_range.h"

namespace fquant {

struct Geometry {
  int dims;
  const int64_t *shape, *kernel, *stride, *padding, *dilation;
  int isa;

  int64_t taps() const {
    int64_t product = 1;
    for (int a = 0; a < dims; ++a) product *= kernel[a];
    return product;
  }
  int last() const { return dims - 1; }

  // Whether offset k and offset K - 1 - k are opposite, for outputs that are the inputs.
  bool is_symmetric() const {
    for (int a = 0; a < dims; ++a) {
      if (stride[a] != 1 || kernel[a] % 2 == 0) return false;
      if (padding[a] != kernel[a] / 2 * dilation[a]) return false;
    }
    return true;
  }
};

// Whether no product of two figures overflows, and every input is inside the grid: what rows
// outside it mean is defined by the sorted method.
inline bool is_ordinary(const Range& in, const Range& out, const Geometry& g) {
  constexpr int64_t kMost = int64_t{1} << 40, kFew = int64_t{1} << 20;
  for (int a = 0; a <= g.dims; ++a) {
    if (std::min(in.low[a], out.low[a]) < -kMost) return false;
    if (std::max(in.high[a], out.high[a]) > kMost) return false;
    if (a == 0) continue;
    const int s = a - 1;
    if (std::max({g.kernel[s], g.stride[s], g.padding[s], g.dilation[s]}) > kFew) return false;
    if (in.low[a] < 0 || in.high[a] >= g.shape[s]) return false;
  }
  return true;
}

template <class T>
bool are_same(const T* coords, int64_t inputs, const T* out_coords, int64_t outputs, int dims) {
  return inputs == outputs &&
         (coords == out_coords ||
          std::memcmp(coords, out_coords, inputs * (1 + dims) * sizeof(T)) == 0);
}

// Each writes the (taps, outputs) table of at least one input and one output. All but the last look
// up what every input or every output meets, those of bricks for the kernels that are most common;
// they return false, with nothing of the table promised, where grid or kernel does not suit them or
// the next one has less to look up.
template <class T>
bool brick_neighbors(const T* coords, int64_t inputs, const T* out_coords, int64_t outputs,
                     const Geometry& g, int32_t* table, int64_t threads);
template <class T>
bool brick_input_neighbors(const T* coords, int64_t inputs, const T* out_coords, int64_t outputs,
                           const Geometry& g, int32_t* table, int64_t threads);
template <class T>
bool input_neighbors(const T* coords, int64_t inputs, const T* out_coords, int64_t outputs,
                     const Geometry& g, int32_t* table, int64_t threads);
template <class T>
bool output_neighbors(const T* coords, int64_t inputs, const T* out_coords, int64_t outputs,
                      const Geometry& g, int32_t* table, int64_t threads);
template <class T>
void sorted_neighbors(const T* coords, int64_t inputs, const T* out_coords, int64_t outputs,
                      const Geometry& g, int32_t* table, int64_t threads);

}  // namespace fquant
