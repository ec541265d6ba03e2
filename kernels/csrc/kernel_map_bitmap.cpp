// Kernel maps without sorting, by looking up what every output reads.
//
// An offset adds a constant to the place of what an output reads, and the offsets of a line (those
// that differ on the last axis only) are one window of bits. Most reads are absent, and cost a few
// instructions on bits that stay in cache.
#include <algorithm>
#include <cstdint>

#include "kernel_map.h"
#include "parallel.h"
#include "voxel_bitmap.h"

namespace fquant {
namespace {

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
  if (!is_ordinary(in_range, out_range, g)) return false;
  Range reads = out_range;
  for (int a = 1; a <= g.dims; ++a) {
    const int s = a - 1;
    reads.low[a] = out_range.low[a] * g.stride[s] - g.padding[s];
    reads.high[a] = out_range.high[a] * g.stride[s] - g.padding[s] +
                    (g.kernel[s] - 1) * g.dilation[s];
  }
  Frame frame;
  frame.axes = 1 + g.dims;
  if (!make_frame(in_range, reads, inputs, &frame)) return false;
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
