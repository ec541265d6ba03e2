// Output voxels of strided and transposed convolutions: the C interface, and the method for grids
// too sparse for a bitmap, where candidates in rising runs are sorted and made unique.
#include <cstdint>
#include <new>
#include <vector>

#include "coord_range.h"
#include "fquant_kernels.h"
#include "output_coords.h"
#include "sorted_keys.h"

namespace fquant {
namespace {

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

// The result of either method.
struct Outputs {
  std::vector<uint64_t> keys;
  OutputWords by_words;
  bool has_words;
};

template <class T>
Outputs find_outputs(const T* coords, int64_t count, const int64_t* shape, const Reach& r) {
  Outputs outputs;
  outputs.has_words = bitmap_outputs(coords, count, shape, r, &outputs.by_words);
  if (!outputs.has_words) outputs.keys = output_keys(coords, count, shape, r);
  return outputs;
}

template <class T>
void write_words(const OutputWords& from, int dims, T* out) {
  T row[1 + kMaxDims];
  int64_t line = -1;
  for (const auto& word : from.words) {
    if (word.line != line) {
      int64_t rest = line = word.line;
      for (int a = dims - 1; a >= 0; --a) {
        row[a] = static_cast<T>(from.low[a] + rest % from.size[a]);
        rest /= from.size[a];
      }
    }
    const int64_t first = from.low[dims] + word.first;
    for (uint64_t bits = word.bits; bits != 0; bits &= bits - 1, out += 1 + dims) {
      for (int a = 0; a < dims; ++a) out[a] = row[a];
      out[dims] = static_cast<T>(first + __builtin_ctzll(bits));
    }
  }
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

template <class T>
void write_outputs(const Outputs& outputs, const int64_t* shape, int dims, T* out) {
  if (!outputs.has_words) {
    write_coords(outputs.keys, shape, dims, out);
  } else if (dims == 3) {  // unrolled
    write_words(outputs.by_words, 3, out);
  } else {
    write_words(outputs.by_words, dims, out);
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
  auto* outputs = new Outputs(
      is_int64 != 0 ? find_outputs(static_cast<const int64_t*>(coords), count, shape, r)
                    : find_outputs(static_cast<const int32_t*>(coords), count, shape, r));
  *num_outputs = outputs->has_words ? outputs->by_words.count
                                    : static_cast<int64_t>(outputs->keys.size());
  return outputs;
} catch (const std::bad_alloc&) {
  return nullptr;
}

void fquant_take_coords(void* keys, int is_int64, int dims, const int64_t* out_shape, void* out) {
  auto* list = static_cast<Outputs*>(keys);
  if (out == nullptr) {
    // nothing to write: the caller only frees
  } else if (is_int64 != 0) {
    write_outputs(*list, out_shape, dims, static_cast<int64_t*>(out));
  } else {
    write_outputs(*list, out_shape, dims, static_cast<int32_t*>(out));
  }
  delete list;
}

}  // extern "C"
