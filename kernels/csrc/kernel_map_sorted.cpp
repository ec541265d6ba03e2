// Kernel maps of any grid: sort the voxels by linear key, then sweep.
//
// For one offset of all axes but the last, the input keys wanted by the outputs in sorted order
// rise, so one pointer finds them all: no hash, no random reads, no dependence on threads.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernel_map.h"
#include "parallel.h"
#include "sorted_keys.h"

namespace fquant {
namespace {

constexpr int kSentinels = 1;  // entries past the sorted keys, so that a sweep may look at them

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
  sorted.keys.resize(kept + kSentinels, INT64_MAX);
  sorted.row.resize(kept);
  sorted.row.resize(kept + kSentinels, 0);
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
  const int64_t at = coords[row * (1 + g.dims) + 1 + axis];
  return static_cast<int64_t>(static_cast<uint64_t>(at) * static_cast<uint64_t>(g.stride[axis]) -
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
      const uint64_t end = static_cast<uint64_t>(at) +
                           static_cast<uint64_t>((g.kernel[a] - 1) * g.dilation[a]);
      if (at >= 0 && at < g.shape[a] && end < static_cast<uint64_t>(g.shape[a])) {
        inside |= (~uint64_t{0} >> (64 - g.kernel[a])) << out->first_bit[a];
        continue;
      }
      for (int64_t k = 0; k < g.kernel[a]; ++k) {
        const uint64_t reach = static_cast<uint64_t>(at) + static_cast<uint64_t>(k * g.dilation[a]);
        inside |= uint64_t{reach < static_cast<uint64_t>(g.shape[a])} << (out->first_bit[a] + k);
      }
    }
    out->base[i] = static_cast<int64_t>(key);
    if (!out->wide) out->inside[i] = inside;
  }
}

// Writes table lines in visiting order. A line is the offsets that differ on the last axis only.
template <class T>
class Sweep {
 public:
  Sweep(const Geometry& g, const Sorted& in, const Outputs& out, const T* out_coords, bool mirrored)
      : g_(g), in_(in), out_(out), coords_(out_coords), count_(out.base.size()),
        mirrored_(mirrored), line_(g.kernel[g.last()]), lines_(g.taps() / line_) {}

  // Lines that have to be swept; with `mirrored` the others are the mirror images of these.
  int64_t lines() const { return mirrored_ ? lines_ / 2 + 1 : lines_; }
  bool is_middle(int64_t line) const { return mirrored_ && line == lines_ / 2; }

  // Outputs [first, last) of one line, to `to`, `line_` rows of all outputs. With `mirrored` also
  // what is found of the opposite line, to `opposite`, whose absent entries are left alone.
  void run(int64_t line, int64_t first, int64_t last, int32_t* to, int32_t* opposite) const {
    Line l{{}, line_, 0, 0};
    uint64_t volume = 1;
    for (int64_t a = g_.last(), rest = line; a >= 0; --a) {
      if (a != g_.last()) {
        l.tap[a] = rest % g_.kernel[a];
        rest /= g_.kernel[a];
        l.delta += volume * static_cast<uint64_t>(l.tap[a] * g_.dilation[a]);
        if (!out_.wide) l.outer |= uint64_t{1} << (out_.first_bit[a] + l.tap[a]);
      }
      volume *= static_cast<uint64_t>(g_.shape[a]);
    }
    if (is_middle(line)) {  // the mirror image of the middle line is the line itself
      l.along = line_ / 2;
      std::copy(out_.row.begin() + first, out_.row.begin() + last, to + l.along * count_ + first);
    }
    mirrored_ ? sweep<true>(l, first, last, to, opposite)
              : sweep<false>(l, first, last, to, opposite);
  }

 private:
  struct Line {
    int64_t tap[kMaxDims];  // offset of every axis but the last
    int64_t along;          // how many offsets of the last axis
    uint64_t delta, outer;  // what `tap` adds to keys, and its bits in Outputs::inside
  };

  template <bool kMirrored>
  void sweep(const Line& l, int64_t first, int64_t last, int32_t* to, int32_t* opposite) const {
    const int64_t num_keys = static_cast<int64_t>(in_.keys.size()) - kSentinels;
    const int64_t* keys = in_.keys.data();
    const int64_t step = g_.dilation[g_.last()];
    int64_t place = 0;
    for (int64_t i = first; i < last; ++i) {
      const bool live =
          out_.wide ? outer_inside(out_.row[i], l.tap) : (out_.inside[i] & l.outer) == l.outer;
      const int64_t low = static_cast<int64_t>(static_cast<uint64_t>(out_.base[i]) + l.delta);
      if (live) place = seek(keys, num_keys, place, low);
      int64_t at = place;
      for (int64_t k = 0; k < l.along; ++k) {
        const int64_t wanted = low + k * step;
        while (live && keys[at] < wanted) ++at;
        const bool found =
            live && at < num_keys && keys[at] == wanted && inside_last(i, k);
        to[k * count_ + i] = found ? in_.row[at] : -1;
        if (kMirrored && found) opposite[(line_ - 1 - k) * count_ + at] = out_.row[i];
      }
    }
  }

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
  bool inside_last(int64_t i, int64_t k) const {
    if (out_.wide) return inside(out_.row[i], g_.last(), k);
    return (out_.inside[i] >> (out_.first_bit[g_.last()] + k) & 1) != 0;
  }

  const Geometry& g_;
  const Sorted& in_;
  const Outputs& out_;
  const T* coords_;
  int64_t count_;
  bool mirrored_;
  int64_t line_, lines_;
};

}  // namespace

template <class T>
void sorted_neighbors(const T* coords, int64_t num_inputs, const T* out_coords,
                      int64_t num_outputs, const Geometry& g, int32_t* table, int64_t threads) {
  const int64_t taps = g.taps();
  const Sorted in = sort_inputs(coords, num_inputs, g);
  const bool same = are_same(coords, num_inputs, out_coords, num_outputs, g.dims);
  const bool mirrored = same && in.unique && g.is_symmetric();
  Outputs out;
  if (same && in.unique) {
    out.row.assign(in.row.begin(), in.row.end() - kSentinels);
  } else {
    out.row = visiting_order(out_coords, num_outputs, g.dims);
  }
  place_outputs(out_coords, num_outputs, g, &out);

  const Sweep<T> sweep(g, in, out, out_coords, mirrored);
  const int64_t line = g.kernel[g.last()], size = line * num_outputs;
  const auto row_of_line = [&](int64_t i) { return table + i * size; };
  const auto opposite_line = [&](int64_t i) { return table + (taps / line - 1 - i) * size; };
  // Outputs of a part: what a line reads of each, about 50 bytes, stays in L2.
  const int64_t grain = 8192;
  // Line by line in visiting order, then to the rows' own places by reads: scattered reads of a
  // row that is in cache overlap, scattered writes of a whole table do not (11.3 ms against 7.9).
  std::vector<int32_t> visit(num_outputs);
  for (int64_t i = 0; i < num_outputs; ++i) visit[out.row[i]] = static_cast<int32_t>(i);
  if (threads > sweep.lines()) threads = sweep.lines();
  std::vector<std::vector<int32_t>> buffers(threads);
  for (auto& buffer : buffers) buffer.resize((mirrored ? 2 : 1) * size);
  parallel_for(sweep.lines(), threads, [&](int64_t worker, int64_t l) {
    int32_t* from = buffers[worker].data();
    const bool middle = sweep.is_middle(l);
    int32_t* opposite = mirrored && !middle ? from + size : from;
    if (mirrored) std::fill(from, from + (middle ? 1 : 2) * size, -1);
    for (int64_t first = 0; first < num_outputs; first += grain) {
      sweep.run(l, first, std::min(first + grain, num_outputs), from, opposite);
    }
    const auto put = [&](const int32_t* rows, int32_t* to) {
      for (int64_t k = 0; k < line; ++k, rows += num_outputs, to += num_outputs) {
        for (int64_t i = 0; i < num_outputs; ++i) to[i] = rows[visit[i]];
      }
    };
    put(from, row_of_line(l));
    if (opposite != from) put(opposite, opposite_line(l));
  });
}

template void sorted_neighbors(const int32_t*, int64_t, const int32_t*, int64_t, const Geometry&,
                               int32_t*, int64_t);
template void sorted_neighbors(const int64_t*, int64_t, const int64_t*, int64_t, const Geometry&,
                               int32_t*, int64_t);

}  // namespace fquant
