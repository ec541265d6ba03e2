// Output voxels of strided and transposed convolutions: candidates in rising runs, sorted, unique.
#include <cstdint>
#include <new>
#include <vector>

#include "fquant_kernels.h"
#include "sorted_keys.h"

namespace fquant {
namespace {

constexpr int kMaxDims = 8;

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

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

// The set is a product over axes: an output is reached if every axis is. So one axis after the
// other is replaced by its outputs, and repeated rows go before the next axis multiplies them.
template <class T>
std::vector<uint64_t> output_keys(const T* coords, int64_t count, const int64_t* shape,
                                  const Reach& r) {
  for (int a = 0; a < r.dims; ++a) {
    if (shape[a] < 1 || r.out_shape[a] < 1) return {};
  }
  std::vector<uint64_t> keys(count);
  for (int64_t i = 0; i < count; ++i) {
    const T* row = coords + i * (1 + r.dims);
    uint64_t key = static_cast<uint64_t>(int64_t{row[0]});
    for (int a = 0; a < r.dims; ++a) {
      key = key * static_cast<uint64_t>(shape[a]) + static_cast<uint64_t>(int64_t{row[1 + a]});
    }
    keys[i] = key;
  }
  std::vector<uint64_t> next;
  uint64_t inner = 1;  // cells of the output grid below the current axis
  for (int axis = r.dims - 1; axis >= 0; --axis) {
    const uint64_t size = static_cast<uint64_t>(shape[axis]);
    const uint64_t out_size = static_cast<uint64_t>(r.out_shape[axis]);
    next.clear();
    bool any = false;
    uint64_t before = 0;
    for (const uint64_t key : keys) {
      const uint64_t below = inner == 1 ? 0 : key % inner, above = inner == 1 ? key : key / inner;
      const uint64_t outer = above / size;
      const int64_t x = static_cast<int64_t>(above - outer * size);
      for (int64_t k = r.kernel[axis] - 1; k >= 0; --k) {
        int64_t o;
        if (!r.output(axis, x, k, &o)) continue;
        const uint64_t to = (outer * out_size + static_cast<uint64_t>(o)) * inner + below;
        if (any && to == before) continue;
        any = true;
        next.push_back(before = to);
      }
    }
    sort_unique(&next);
    keys.swap(next);
    inner *= out_size;
  }
  return keys;
}

template <class T>
void write_coords(const std::vector<uint64_t>& keys, const int64_t* shape, int dims, T* out) {
  for (size_t i = 0; i < keys.size(); ++i) {
    uint64_t key = keys[i];
    T* row = out + static_cast<int64_t>(i) * (1 + dims);
    for (int a = dims - 1; a >= 0; --a) {
      row[1 + a] = static_cast<T>(key % static_cast<uint64_t>(shape[a]));
      key /= static_cast<uint64_t>(shape[a]);
    }
    row[0] = static_cast<T>(key);
  }
}

}  // namespace
}  // namespace fquant

using namespace fquant;

extern "C" {

void* fquant_output_keys(int is_int64, const void* coords, int64_t count, int dims,
                         const int64_t* shape, const int64_t* kernel, const int64_t* stride,
                         const int64_t* padding, const int64_t* dilation,
                         const int64_t* out_shape, int transposed, int64_t* num_outputs) try {
  if (dims < 1 || dims > kMaxDims) return nullptr;
  const Reach r{dims, kernel, stride, padding, dilation, out_shape, transposed != 0};
  auto* keys = new std::vector<uint64_t>(
      is_int64 != 0 ? output_keys(static_cast<const int64_t*>(coords), count, shape, r)
                    : output_keys(static_cast<const int32_t*>(coords), count, shape, r));
  *num_outputs = static_cast<int64_t>(keys->size());
  return keys;
} catch (const std::bad_alloc&) {
  return nullptr;
}

void fquant_take_coords(void* keys, int is_int64, int dims, const int64_t* out_shape, void* out) {
  auto* list = static_cast<std::vector<uint64_t>*>(keys);
  if (out == nullptr) {
    // nothing to write: the caller only frees
  } else if (is_int64 != 0) {
    write_coords(*list, out_shape, dims, static_cast<int64_t*>(out));
  } else {
    write_coords(*list, out_shape, dims, static_cast<int32_t*>(out));
  }
  delete list;
}

}  // extern "C"
