// The two methods of output voxels, and what they share.
#pragma once

#include <cstdint>
#include <vector>

namespace fquant {

inline int64_t floor_div(int64_t a, int64_t b) {
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}

struct Reach {
  int dims;
  const int64_t *kernel, *stride, *padding, *dilation, *out_shape;
  bool transposed;

  // The output position, if any, that reads input position x by offset k of one axis.
  bool output(int axis, int64_t x, int64_t k, int64_t* o) const {
    if (transposed) {
      *o = x * stride[axis] - padding[axis] + k * dilation[axis];
    } else {
      const int64_t reach = x + padding[axis] - k * dilation[axis];
      *o = floor_div(reach, stride[axis]);
      if (*o * stride[axis] != reach) return false;
    }
    return *o >= 0 && *o < out_shape[axis];
  }
};

// Output voxels in rising order, 64 cells of the last axis at a time.
struct OutputWords {
  struct Word {
    int64_t line;   // row-major index over all axes but the last, counted from `low`
    int64_t first;  // the cell of bit 0, counted from `low`
    uint64_t bits;
  };
  std::vector<Word> words;
  std::vector<int64_t> low, size;  // batch first; of the box around the outputs
  int64_t count = 0;
};

// False, with nothing promised, where the grid does not suit the method.
template <class T>
bool bitmap_outputs(const T* coords, int64_t count, const int64_t* shape, const Reach& reach,
                    OutputWords* out);

}  // namespace fquant
