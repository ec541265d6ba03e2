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
#include "voxel_lookup.h"

namespace fquant {
namespace {

// Writes the table's rows of one line for the outputs [first, last). If mirrored, only offsets
// before the middle one, and what they find is also written for the opposite offsets.
template <bool kMirrored>
void write_line(const Voxels& voxels, const Rows& out, const Frame& f, const Geometry& g,
                int64_t line, int64_t first, int64_t last, int64_t outputs, int32_t* table) {
  const int64_t along = g.kernel[g.last()], step = g.dilation[g.last()], taps = g.taps();
  const int64_t until = kMirrored ? std::min(along, taps / 2 - line * along) : along;
  uint32_t place = 0, shift = 0;
  for (int64_t a = g.last() - 1, rest = line; a >= 0; --a) {
    const uint32_t offset = static_cast<uint32_t>(rest % g.kernel[a] * g.dilation[a]);
    rest /= g.kernel[a];
    place += f.place[1 + a] * offset;
    shift += f.line[1 + a] * offset;
  }
  const int64_t per_window = 1 + (kWindow - 1) / step;
  for (int64_t begin = first; begin < last; begin += kGrain) {
    const int64_t count = std::min(kGrain, last - begin);
    for (int64_t k0 = 0; k0 < until; k0 += per_window) {
      Window window;
      for (int64_t k = k0; k < std::min(k0 + per_window, until); ++k) {
        const int64_t tap = line * along + k;
        window.add((k - k0) * step, tap);
        std::fill_n(table + tap * outputs + begin, count, -1);
      }
      look_up(voxels, &out.place[begin], place + static_cast<uint32_t>(k0 * step),
              &out.line[begin], shift, count, window,
              [=](int64_t tap, int64_t i, int32_t row) {
                table[tap * outputs + begin + i] = row;
                if (kMirrored) {
                  table[(taps - 1 - tap) * outputs + row] = static_cast<int32_t>(begin + i);
                }
              });
    }
  }
}

}  // namespace

template <class T>
bool output_neighbors(const T* coords, int64_t inputs, const T* out_coords, int64_t outputs,
                      const Geometry& g, int32_t* table, int64_t threads) {
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
    const auto write = mirrored ? write_line<true> : write_line<false>;
    write(voxels, out, frame, g, task % swept, first, last, outputs, table);
  });
  return true;
}

template bool output_neighbors(const int32_t*, int64_t, const int32_t*, int64_t, const Geometry&,
                               int32_t*, int64_t);
template bool output_neighbors(const int64_t*, int64_t, const int64_t*, int64_t, const Geometry&,
                               int32_t*, int64_t);

}  // namespace fquant
