// Kernel maps: sort the voxels by linear key, then sweep.
//
// For one offset of all axes but the last, the input keys wanted by the outputs in sorted order
// rise, so one pointer finds them all: no hash, no random reads, no dependence on threads.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <tuple>
#include <vector>

#include "fquant_kernels.h"
#include "parallel.h"
#include "sorted_keys.h"

namespace fquant {
namespace {

constexpr int kMaxDims = 8;

struct Geometry {
  int dims;
  const int64_t *shape, *kernel, *stride, *padding, *dilation;

  int64_t taps() const {
    int64_t product = 1;
    for (int a = 0; a < dims; ++a) product *= kernel[a];
    return product;
  }
  int last() const { return dims - 1; }
};

// Keys are sums of products in wrapping uint64, so rows outside the grid are wrong but harmless.
template <class T>
uint64_t key_of(const T* row, const int64_t* shape, int dims) {
  uint64_t key = static_cast<uint64_t>(static_cast<int64_t>(row[0]));
  for (int a = 0; a < dims; ++a) {
    key = key * static_cast<uint64_t>(shape[a]) + static_cast<uint64_t>(int64_t{row[1 + a]});
  }
  return key;
}

struct Sorted {
  std::vector<int64_t> keys;  // rising, no two equal
  std::vector<int32_t> row;   // where each was; the first of equal ones
  bool unique;
};

template <class T>
Sorted sort_inputs(const T* coords, int64_t count, const Geometry& g) {
  std::vector<uint64_t> keys(count);
  constexpr uint64_t kSign = uint64_t{1} << 63;  // signed order from unsigned sorting
  for (int64_t i = 0; i < count; ++i) {
    keys[i] = key_of(coords + i * (1 + g.dims), g.shape, g.dims) ^ kSign;
  }
  Sorted sorted;
  sort_keys(&keys, &sorted.row);
  sorted.keys.resize(count);
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t key = static_cast<int64_t>(keys[i] ^ kSign);
    if (kept > 0 && sorted.keys[kept - 1] == key) continue;
    sorted.keys[kept] = key;
    sorted.row[kept++] = sorted.row[i];
  }
  sorted.unique = kept == count;
  sorted.keys.resize(kept);
  sorted.row.resize(kept);
  return sorted;
}

// The order in which to visit outputs: lexicographic, whatever grid they are on. Any order is
// right, this one is fast.
template <class T>
std::vector<int32_t> visiting_order(const T* coords, int64_t count, int dims) {
  std::vector<int32_t> order;
  int64_t least[kMaxDims + 1], size[kMaxDims + 1];
  for (int a = 0; a <= dims; ++a) {
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (int64_t i = 0; i < count; ++i) {
      low = std::min<int64_t>(low, coords[i * (1 + dims) + a]);
      high = std::max<int64_t>(high, coords[i * (1 + dims) + a]);
    }
    least[a] = low;
    size[a] = static_cast<int64_t>(static_cast<uint64_t>(high) - static_cast<uint64_t>(low) + 1);
  }
  std::vector<uint64_t> keys(count);
  for (int64_t i = 0; i < count; ++i) {
    uint64_t key = 0;
    for (int a = 0; a <= dims; ++a) {
      const int64_t value = coords[i * (1 + dims) + a];
      key = key * static_cast<uint64_t>(size[a]) +
            (static_cast<uint64_t>(value) - static_cast<uint64_t>(least[a]));
    }
    keys[i] = key;
  }
  sort_keys(&keys, &order);
  return order;
}

// Outputs in visiting order: the key their offset 0 reads, and which offsets of each axis stay
// inside the grid (one bit each, axes one after the other; `wide` if they do not fit in 64).
struct Outputs {
  std::vector<int32_t> row;
  std::vector<int64_t> base;
  std::vector<uint64_t> inside;
  int first_bit[kMaxDims];
  bool wide;
};

template <class T>
int64_t position(const T* coords, int64_t row, int axis, const Geometry& g) {
  return static_cast<int64_t>(static_cast<uint64_t>(int64_t{coords[row * (1 + g.dims) + 1 + axis]}) *
                                  static_cast<uint64_t>(g.stride[axis]) -
                              static_cast<uint64_t>(g.padding[axis]));
}

template <class T>
void place_outputs(const T* coords, int64_t count, const Geometry& g, Outputs* out) {
  int bits = 0;
  for (int a = 0; a < g.dims; ++a) {
    out->first_bit[a] = bits;
    bits = static_cast<int>(std::min<int64_t>(65, bits + g.kernel[a]));
  }
  out->wide = bits > 64;
  out->base.resize(count);
  if (!out->wide) out->inside.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = out->row[i];
    uint64_t key = static_cast<uint64_t>(static_cast<int64_t>(coords[row * (1 + g.dims)]));
    uint64_t inside = 0;
    for (int a = 0; a < g.dims; ++a) {
      const int64_t at = position(coords, row, a, g);
      key = key * static_cast<uint64_t>(g.shape[a]) + static_cast<uint64_t>(at);
      if (out->wide) continue;
      for (int64_t k = 0; k < g.kernel[a]; ++k) {
        const uint64_t reach = static_cast<uint64_t>(at) + static_cast<uint64_t>(k * g.dilation[a]);
        inside |= uint64_t{reach < static_cast<uint64_t>(g.shape[a])} << (out->first_bit[a] + k);
      }
    }
    out->base[i] = static_cast<int64_t>(key);
    if (!out->wide) out->inside[i] = inside;
  }
}

template <class T>
class Sweep {
 public:
  Sweep(const Geometry& g, const Sorted& in, const Outputs& out, const T* out_coords,
        int64_t num_outputs, bool mirrored, int32_t* table)
      : g_(g), in_(in), out_(out), coords_(out_coords), m_(num_outputs), mirrored_(mirrored),
        table_(table), line_(g.kernel[g.last()]), lines_(g.taps() / line_) {}

  // Lines of offsets along the last axis that have to be swept; the others are their mirrors.
  int64_t lines() const { return mirrored_ ? lines_ / 2 + 1 : lines_; }

  // Outputs [first, last) of one line. With `mirrored`, fill() must have been called.
  void run(int64_t line, int64_t first, int64_t last) const {
    const Geometry& g = g_;
    int64_t tap[kMaxDims] = {};
    uint64_t delta = 0, outer = 0, volume = 1;
    for (int64_t a = g.last(), rest = line; a >= 0; --a) {
      if (a != g.last()) {
        tap[a] = rest % g.kernel[a];
        rest /= g.kernel[a];
        delta += volume * static_cast<uint64_t>(tap[a] * g.dilation[a]);
        if (!out_.wide) outer |= uint64_t{1} << (out_.first_bit[a] + tap[a]);
      }
      volume *= static_cast<uint64_t>(g.shape[a]);
    }
    // Of the middle line the mirror image is the line itself: sweep its first half.
    const bool middle = mirrored_ && line == lines_ / 2;
    const int64_t along = middle ? line_ / 2 : line_;
    int64_t place = 0;
    const int64_t count = static_cast<int64_t>(in_.keys.size());
    const int64_t* keys = in_.keys.data();
    const int64_t step = g.dilation[g.last()];
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = out_.row[i];
      int32_t* to = table_ + line * line_ * m_ + row;
      if (middle) to[along * m_] = static_cast<int32_t>(row);
      const bool live = out_.wide ? outer_inside(row, tap) : (out_.inside[i] & outer) == outer;
      if (!live) {
        if (!mirrored_) {
          for (int64_t k = 0; k < along; ++k) to[k * m_] = -1;
        }
        continue;
      }
      const int64_t low = static_cast<int64_t>(static_cast<uint64_t>(out_.base[i]) + delta);
      place = seek(keys, count, place, low);
      int64_t at = place;
      for (int64_t k = 0; k < along; ++k) {
        const int64_t wanted = low + k * step;
        while (at < count && keys[at] < wanted) ++at;
        const bool found = at < count && keys[at] == wanted && inside_last(i, row, k);
        if (mirrored_) {
          if (!found) continue;
          const int64_t source = in_.row[at];
          to[k * m_] = static_cast<int32_t>(source);
          const int64_t opposite = lines_ * line_ - 1 - (line * line_ + k);
          table_[opposite * m_ + source] = static_cast<int32_t>(row);
        } else {
          to[k * m_] = found ? in_.row[at] : -1;
        }
      }
    }
  }

 private:
  bool outer_inside(int64_t row, const int64_t* tap) const {
    for (int a = 0; a < g_.last(); ++a) {
      if (!inside(row, a, tap[a])) return false;
    }
    return true;
  }
  bool inside(int64_t row, int axis, int64_t k) const {
    const uint64_t reach = static_cast<uint64_t>(position(coords_, row, axis, g_)) +
                           static_cast<uint64_t>(k * g_.dilation[axis]);
    return reach < static_cast<uint64_t>(g_.shape[axis]);
  }
  bool inside_last(int64_t i, int64_t row, int64_t k) const {
    if (out_.wide) return inside(row, g_.last(), k);
    return (out_.inside[i] >> (out_.first_bit[g_.last()] + k) & 1) != 0;
  }

  const Geometry& g_;
  const Sorted& in_;
  const Outputs& out_;
  const T* coords_;
  int64_t m_;
  bool mirrored_;
  int32_t* table_;
  int64_t line_, lines_;
};

// Whether offset k and offset K - 1 - k are opposite, for outputs that are the inputs.
bool is_symmetric(const Geometry& g) {
  for (int a = 0; a < g.dims; ++a) {
    if (g.stride[a] != 1 || g.kernel[a] % 2 == 0) return false;
    if (g.padding[a] != g.kernel[a] / 2 * g.dilation[a]) return false;
  }
  return true;
}

template <class T>
void neighbors(const T* coords, int64_t num_inputs, const T* out_coords, int64_t num_outputs,
               const Geometry& g, int32_t* table, int64_t threads) {
  const int64_t taps = g.taps();
  if (num_inputs == 0 || num_outputs == 0) {
    std::fill(table, table + taps * num_outputs, -1);
    return;
  }
  const Sorted in = sort_inputs(coords, num_inputs, g);
  const bool same =
      num_inputs == num_outputs &&
      (coords == out_coords ||
       std::memcmp(coords, out_coords, num_inputs * (1 + g.dims) * sizeof(T)) == 0);
  const bool mirrored = same && in.unique && is_symmetric(g);
  Outputs out;
  out.row = same && in.unique ? in.row : visiting_order(out_coords, num_outputs, g.dims);
  place_outputs(out_coords, num_outputs, g, &out);

  const Sweep<T> sweep(g, in, out, out_coords, num_outputs, mirrored, table);
  const int64_t grain = 32768, parts = (num_outputs + grain - 1) / grain;
  if (threads > parts * sweep.lines()) threads = parts * sweep.lines();
  if (mirrored) {
    parallel_for(taps, threads, [&](int64_t, int64_t k) {
      std::fill(table + k * num_outputs, table + (k + 1) * num_outputs, -1);
    });
  }
  parallel_for(sweep.lines() * parts, threads, [&](int64_t, int64_t i) {
    const int64_t first = i % parts * grain;
    sweep.run(i / parts, first, std::min(first + grain, num_outputs));
  });
}

}  // namespace
}  // namespace fquant

using namespace fquant;

extern "C" {

int fquant_kernel_neighbors(int is_int64, const void* coords, int64_t inputs,
                            const void* out_coords, int64_t outputs, int dims,
                            const int64_t* shape, const int64_t* kernel, const int64_t* stride,
                            const int64_t* padding, const int64_t* dilation, int32_t* table,
                            int64_t threads) try {
  if (dims < 1 || dims > kMaxDims) return FQUANT_BAD_ARGUMENT;
  const Geometry g{dims, shape, kernel, stride, padding, dilation};
  if (is_int64 != 0) {
    neighbors(static_cast<const int64_t*>(coords), inputs, static_cast<const int64_t*>(out_coords),
              outputs, g, table, threads);
  } else {
    neighbors(static_cast<const int32_t*>(coords), inputs, static_cast<const int32_t*>(out_coords),
              outputs, g, table, threads);
  }
  return FQUANT_OK;
} catch (const std::bad_alloc&) {
  return FQUANT_OUT_OF_MEMORY;
}

int fquant_transpose_neighbors(const int32_t* neighbors, int64_t taps, int64_t outputs,
                               int64_t inputs, int32_t* table, int64_t threads) try {
  std::atomic<bool> in_range{true};
  parallel_for(taps, threads, [&](int64_t, int64_t k) {
    const int32_t* from = neighbors + k * outputs;
    int32_t* to = table + k * inputs;
    std::fill(to, to + inputs, -1);
    for (int64_t m = 0; m < outputs; ++m) {
      if (from[m] < 0) continue;
      if (from[m] >= inputs) {
        in_range = false;
        return;
      }
      to[from[m]] = static_cast<int32_t>(m);
    }
  });
  return in_range ? FQUANT_OK : FQUANT_INDEX_OUT_OF_RANGE;
} catch (const std::bad_alloc&) {
  return FQUANT_OUT_OF_MEMORY;
}

}  // extern "C"
