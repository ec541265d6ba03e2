// Kernel maps without sorting: a bitmap of the voxels says which reads find one, its ranks say where.
//
// A voxel's place in the bitmap is linear in its coordinates, modulo the size of the bitmap, and
// 1 along the last axis. So an offset adds a constant to the place, and the offsets of a line (those
// that differ on the last axis only) are one window of bits. The bitmap has 32 to 64 bits per voxel
// however large the grid is; where the grid is larger, cells share a place, 2 to 3 % of the absent
// reads look present, and the line kept beside each voxel tells. Most reads are absent and cost a
// few instructions on bits that stay in cache.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "bits.h"
#include "kernel_map.h"
#include "parallel.h"

namespace fquant {
namespace {

constexpr int kAxes = kMaxDims + 1;  // the batch is the first axis
constexpr int64_t kGrain = 2048;     // outputs whose windows are found before any is looked up
constexpr size_t kMostShared = 16;   // cells of one place, or the grid is left to sorting
constexpr int64_t kWindow = 57;      // bits that `bits_from` gives for sure

// Odd parts of a full circle, one per axis but the last: the lattice of cells that share a place
// must have no short vectors, or neighbors would be taken for each other.
constexpr uint32_t kStrides[kAxes] = {0x9e3779b9, 0xc2b2ae3d, 0x85ebca77, 0x27d4eb2f, 0x165667b1,
                                      0xd6e8feb8, 0xa0761d64, 0xe7037ed1, 0x8ebc6af0};

// Where the rows of both sides lie, and how coordinates become places and lines.
struct Frame {
  int axes;
  int place_bits;
  int64_t low[kAxes];      // of inputs and of all that outputs read
  uint32_t place[kAxes];   // strides of places, modulo 2^32
  uint32_t line[kAxes];    // strides of lines: the row-major index over all axes but the last
};

struct Range {
  int64_t low[kAxes], high[kAxes];
};

template <class T>
Range range_of(const T* coords, int64_t count, int axes) {
  Range range;
  for (int a = 0; a < axes; ++a) {
    T low = coords[a], high = coords[a];
    for (int64_t i = 1; i < count; ++i) {
      low = std::min(low, coords[i * axes + a]);
      high = std::max(high, coords[i * axes + a]);
    }
    range.low[a] = low;
    range.high[a] = high;
  }
  return range;
}

// False where the method does not suit: rows outside the grid, which the sorted method defines;
// a last axis of more than 64 bits per voxel; 2^32 lines and more.
bool make_frame(const Range& in, const Range& out, int64_t inputs, const Geometry& g,
                Frame* frame) {
  constexpr int64_t kMost = int64_t{1} << 40;  // of any figure: no product of two overflows
  frame->axes = 1 + g.dims;
  __int128 lines = 1, last = 1;
  for (int a = 0; a <= g.dims; ++a) {
    int64_t low = out.low[a], high = out.high[a];
    if (std::max({std::abs(low), std::abs(high), std::abs(in.low[a]), std::abs(in.high[a])}) >
        kMost) {
      return false;
    }
    if (a > 0) {
      const int64_t stride = g.stride[a - 1], padding = g.padding[a - 1];
      const int64_t kernel = g.kernel[a - 1], dilation = g.dilation[a - 1];
      constexpr int64_t kFew = int64_t{1} << 20;
      if (std::max({stride, padding, kernel, dilation}) > kFew) return false;
      if (in.low[a] < 0 || in.high[a] >= g.shape[a - 1]) return false;
      low = low * stride - padding;
      high = high * stride - padding + (kernel - 1) * dilation;
    }
    low = std::min(low, in.low[a]);
    const int64_t extent = std::max(high, in.high[a]) - low + 1;
    frame->low[a] = low;
    if (a < g.dims) {
      lines *= extent;
      if (lines >= (int64_t{1} << 32)) return false;
    } else {
      last = extent;
    }
  }
  const auto ceil_log2 = [](__int128 x) {
    int bits = 0;
    while ((static_cast<__int128>(1) << bits) < x) ++bits;
    return bits;
  };
  // At least one word, and no more than a dense box of all cells has.
  const int wanted = ceil_log2(static_cast<__int128>(inputs) * 64), dense = ceil_log2(lines * last);
  const int bits = std::max({6, std::min(wanted, dense), ceil_log2(last)});
  if (bits > std::min(31, wanted + 6)) return false;
  frame->place_bits = bits;
  uint32_t natural = 1, line = 1;
  for (int a = g.dims; a >= 0; --a) {
    frame->place[a] = dense <= bits ? natural : kStrides[a] >> (32 - bits) | 1;
    frame->line[a] = line;
    const int64_t high = a == 0 ? out.high[a]
                                : out.high[a] * g.stride[a - 1] - g.padding[a - 1] +
                                      (g.kernel[a - 1] - 1) * g.dilation[a - 1];
    const int64_t extent = std::max(high, in.high[a]) - frame->low[a] + 1;
    natural *= static_cast<uint32_t>(extent);
    if (a < g.dims) line *= static_cast<uint32_t>(extent);
  }
  frame->place[g.dims] = 1;
  frame->line[g.dims] = 0;
  return true;
}

// Rows as (place, line): what tells whether two rows are the same cell.
struct Rows {
  std::unique_ptr<uint32_t[]> place, line;
};

// The cell of row i is coords[i] * stride - padding, or coords[i] where `g` is null.
template <class T>
Rows locate(const T* coords, int64_t count, const Frame& f, const Geometry* g) {
  Rows rows{std::unique_ptr<uint32_t[]>(new uint32_t[count]),
            std::unique_ptr<uint32_t[]>(new uint32_t[count])};
  uint32_t place_step[kAxes], line_step[kAxes], place0 = 0, line0 = 0;
  for (int a = 0; a < f.axes; ++a) {
    const int64_t stride = g != nullptr && a > 0 ? g->stride[a - 1] : 1;
    const int64_t padding = g != nullptr && a > 0 ? g->padding[a - 1] : 0;
    const uint32_t shift = static_cast<uint32_t>(-padding - f.low[a]);
    place_step[a] = f.place[a] * static_cast<uint32_t>(stride);
    line_step[a] = f.line[a] * static_cast<uint32_t>(stride);
    place0 += f.place[a] * shift;
    line0 += f.line[a] * shift;
  }
  const auto fill = [&](int axes) {
    for (int64_t i = 0; i < count; ++i) {
      uint32_t place = place0, line = line0;
      for (int a = 0; a < axes; ++a) {
        const uint32_t x = static_cast<uint32_t>(coords[i * axes + a]);
        place += x * place_step[a];
        line += x * line_step[a];
      }
      rows.place[i] = place;
      rows.line[i] = line;
    }
  };
  f.axes == 4 ? fill(4) : fill(f.axes);  // three dimensions: unrolled
  return rows;
}

// The input voxels: a bitmap over places, and per set bit the voxel that has it.
class Voxels {
 public:
  Voxels(const Rows& rows, int64_t count, int place_bits)
      : mask_((uint32_t{1} << place_bits) - 1), words_(int64_t{1} << (place_bits - 6)),
        bits_(words_ + 2, 0), before_(new int32_t[words_]), slots_(count + 64) {
    std::unique_ptr<int32_t[]> late(new int32_t[count]);  // rows that find their bit set
    int64_t num_late = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t place = rows.place[i] & mask_;
      uint64_t* word = &bits_[place >> 6];
      late[num_late] = static_cast<int32_t>(i);
      num_late += *word >> (place & 63) & 1;
      *word |= uint64_t{1} << (place & 63);
    }
    int32_t sum = 0;
    for (int64_t w = 0; w < words_; ++w) {
      before_[w] = sum;
      sum += count_bits(bits_[w]);
    }
    bits_[words_] = bits_[0];  // windows wrap around
    for (int64_t i = count; i-- > 0;) {  // the first row of a place is written last
      slots_[rank(rows.place[i])] = {rows.line[i], static_cast<int32_t>(i)};
    }
    late_rows(rows, late.get(), num_late);
    std::copy(slots_.begin(), slots_.begin() + std::min<int64_t>(sum, 64), slots_.begin() + sum);
  }

  bool unique() const { return unique_; }
  bool crowded() const { return crowded_; }
  uint64_t window(uint32_t place) const { return bits_from(bits_.data(), place & mask_); }

  // The search of a window's voxels, in steps that each ask for what the next one reads: many
  // searches go side by side, and waiting for memory one after the other is most of their time.
  void prepare(uint32_t place) const { __builtin_prefetch(&before_[(place & mask_) >> 6]); }
  int32_t rank(uint32_t place) const {
    const uint32_t at = place & mask_;
    const uint64_t below = (uint64_t{1} << (at & 63)) - 1;
    const int32_t slot = before_[at >> 6] + count_bits(bits_[at >> 6] & below);
    __builtin_prefetch(&slots_[slot]);
    return slot;
  }
  // The row of the cell whose bit is the rank-th one, or -1; below -1 if `find_shared` has to look.
  int32_t find(int64_t rank, uint32_t line, bool present) const {
    const Slot slot = slots_[rank];
    const int32_t other = -int32_t{slot.line != line};
    return slot.row | (other & ~(slot.row >> 31)) | (int32_t{present} - 1);
  }
  int32_t find_shared(int32_t found, uint32_t line) const {
    const Slot* slot = &shared_[-2 - int64_t{found}];
    while (slot->line != line && slot->row >= 0) ++slot;
    return slot->row;
  }

 private:
  struct Slot {
    uint32_t line;
    int32_t row;  // or -2 - i, where several cells have the place and shared_[i] is the first
  };

  // Gives rows that found their bit set the slots after the first row's; row -1 ends them.
  void late_rows(const Rows& rows, const int32_t* late, int64_t count) {
    std::vector<std::pair<int32_t, int32_t>> by_slot;
    for (int64_t n = 0; n < count; ++n) by_slot.push_back({rank(rows.place[late[n]]), late[n]});
    std::sort(by_slot.begin(), by_slot.end());
    for (size_t n = 0; n < by_slot.size();) {
      const int32_t at = by_slot[n].first;
      const size_t begin = shared_.size();
      shared_.push_back(slots_[at]);
      for (; n < by_slot.size() && by_slot[n].first == at; ++n) {
        const uint32_t line = rows.line[by_slot[n].second];
        const auto same = [&](const Slot& slot) { return slot.line == line; };
        if (std::any_of(shared_.begin() + begin, shared_.end(), same)) {
          unique_ = false;  // the first row of a cell counts
        } else {
          shared_.push_back({line, by_slot[n].second});
        }
        if (shared_.size() - begin > kMostShared) crowded_ = true;
        if (crowded_) return;
      }
      if (shared_.size() == begin + 1) {
        shared_.pop_back();
        continue;
      }
      slots_[at].row = -2 - static_cast<int32_t>(begin);
      shared_.push_back({0, -1});
    }
  }
  uint32_t mask_;
  int64_t words_;
  std::vector<uint64_t> bits_;  // and one word more, the first again, and one to read past
  std::unique_ptr<int32_t[]> before_;
  std::vector<Slot> slots_;  // and the first ones again
  std::vector<Slot> shared_;
  bool unique_ = true, crowded_ = false;
};

// Lines of offsets, and the outputs [first, last) that make their reads.
struct Line {
  int64_t line, first, last, outputs;
  int32_t* table;
};

// Writes the table's rows of one line. If mirrored, only offsets before the middle one, and what
// they find is also written for the opposite offsets. kTaps is how many offsets are on the line if
// that is a constant and they are consecutive voxels, 0 otherwise.
template <bool kMirrored, int kTaps>
void write_line(const Voxels& voxels, const Rows& out, const Frame& f, const Geometry& g,
                const Line& l) {
  const int64_t along = g.kernel[g.last()], taps = g.taps();
  const int64_t step = kTaps != 0 ? 1 : g.dilation[g.last()];
  const int64_t until = kMirrored ? std::min(along, taps / 2 - l.line * along) : along;
  uint32_t place = 0, shift = 0;
  for (int64_t a = g.last() - 1, rest = l.line; a >= 0; --a) {
    const uint32_t offset = static_cast<uint32_t>(rest % g.kernel[a] * g.dilation[a]);
    rest /= g.kernel[a];
    place += f.place[1 + a] * offset;
    shift += f.line[1 + a] * offset;
  }
  const int64_t per_window = 1 + (kWindow - 1) / step;  // offsets one window tells of
  uint64_t windows[kGrain];
  uint16_t some[kGrain];  // outputs whose window is not empty
  int32_t ranks[kGrain];
  int32_t unused = 0;
  for (int64_t begin = l.first; begin < l.last; begin += kGrain) {
    const int64_t count = std::min(kGrain, l.last - begin);
    const uint32_t* places = &out.place[begin];
    const uint32_t* lines = &out.line[begin];
    for (int64_t k0 = 0; k0 < until; k0 += per_window) {
      const int64_t width = kTaps != 0 ? kTaps : std::min(per_window, until - k0);
      const uint32_t delta = place + static_cast<uint32_t>(k0 * step);
      uint64_t mask = 0;
      for (int64_t k = 0; k < width; ++k) mask |= uint64_t{1} << (k * step);
      int32_t* to = l.table + (l.line * along + k0) * l.outputs + begin;
      int32_t* opposite = l.table + (taps - 1 - l.line * along - k0) * l.outputs;
      for (int64_t k = 0; k < width; ++k) {
        std::fill(to + k * l.outputs, to + k * l.outputs + count, -1);
      }
      int64_t num_some = 0;  // appended without a branch, which would be mispredicted often
      for (int64_t i = 0; i < count; ++i) {
        windows[i] = voxels.window(places[i] + delta);
        some[num_some] = static_cast<uint16_t>(i);
        num_some += (windows[i] & mask) != 0;
      }
      for (int64_t n = 0; n < num_some; ++n) voxels.prepare(places[some[n]] + delta);
      for (int64_t n = 0; n < num_some; ++n) ranks[n] = voxels.rank(places[some[n]] + delta);
      int64_t num_shared = 0;
      for (int64_t n = 0; n < num_some; ++n) {
        const int64_t i = some[n];
        const uint64_t window = windows[i];
        int32_t least = 0;
        int64_t rank = ranks[n];
        for (int64_t k = 0; k < width; ++k) {
          const uint64_t bit = uint64_t{1} << (k * step);
          if (kTaps == 0) rank = ranks[n] + count_bits(window & (bit - 1));
          const int32_t row = voxels.find(rank, lines[i] + shift, (window & bit) != 0);
          if (kTaps != 0) rank += (window & bit) != 0;
          to[k * l.outputs + i] = row;
          least = std::min(least, row);
          if (kMirrored) {
            *select(row >= 0, opposite - k * l.outputs, row, &unused) =
                static_cast<int32_t>(begin + i);
          }
        }
        some[num_shared] = static_cast<uint16_t>(i);
        num_shared += least < -1;
      }
      for (int64_t n = 0; n < num_shared; ++n) {
        const int64_t i = some[n];
        for (int64_t k = 0; k < width; ++k) {
          int32_t* row = to + k * l.outputs + i;
          if (*row >= -1) continue;
          *row = voxels.find_shared(*row, lines[i] + shift);
          if (kMirrored && *row >= 0) {
            (opposite - k * l.outputs)[*row] = static_cast<int32_t>(begin + i);
          }
        }
      }
    }
  }
}

}  // namespace

template <class T>
bool bitmap_neighbors(const T* coords, int64_t inputs, const T* out_coords, int64_t outputs,
                      const Geometry& g, int32_t* table, int64_t threads) {
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
  return false;
#endif
  const bool same = are_same(coords, inputs, out_coords, outputs, g.dims);
  const Range in_range = range_of(coords, inputs, 1 + g.dims);
  const Range out_range = same ? in_range : range_of(out_coords, outputs, 1 + g.dims);
  Frame frame;
  if (!make_frame(in_range, out_range, inputs, g, &frame)) return false;
  const Rows in_rows = locate(coords, inputs, frame, nullptr);
  const Voxels voxels(in_rows, inputs, frame.place_bits);
  if (voxels.crowded()) return false;
  const Rows out = locate(out_coords, outputs, frame, &g);

  const bool mirrored = same && voxels.unique() && g.is_symmetric();
  const int64_t taps = g.taps(), lines = taps / g.kernel[g.last()];
  const int64_t swept = mirrored ? lines / 2 + 1 : lines;
  if (mirrored) {
    parallel_for(taps, threads, [&](int64_t, int64_t k) {
      int32_t* to = table + k * outputs;
      if (k > taps / 2) std::fill(to, to + outputs, -1);
      for (int64_t i = 0; k == taps / 2 && i < outputs; ++i) to[i] = static_cast<int32_t>(i);
    });
  }
  const int64_t part = 16 * kGrain, parts = (outputs + part - 1) / part;
  parallel_for(parts * swept, threads, [&](int64_t, int64_t task) {
    const int64_t first = task / swept * part, last = std::min(first + part, outputs);
    const Line l{task % swept, first, last, outputs, table};
    const bool whole = !mirrored || l.line < lines / 2;
    const bool three = whole && g.kernel[g.last()] == 3 && g.dilation[g.last()] == 1;
    const auto write = mirrored ? three ? write_line<true, 3> : write_line<true, 0>
                                : three ? write_line<false, 3> : write_line<false, 0>;
    write(voxels, out, frame, g, l);
  });
  return true;
}

template bool bitmap_neighbors(const int32_t*, int64_t, const int32_t*, int64_t, const Geometry&,
                               int32_t*, int64_t);
template bool bitmap_neighbors(const int64_t*, int64_t, const int64_t*, int64_t, const Geometry&,
                               int32_t*, int64_t);

}  // namespace fquant
