// Kernel maps without sorting, by looking up which outputs read every input: for kernels more than
// twice as long as strides and for grids too sparse for bricks.
//
// With strides few offsets lead from an input to an output, the same ones for all inputs of one
// residue, and nearly all of those outputs are there: far fewer look-ups than every output's reads.
// Maps of stride 2, 86k / 110k / 89k voxels, ms (Zen 3): 8.1 / 7.2 / 6.4 against 10.2 / 9.0 / 9.3.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernel_map.h"
#include "parallel.h"
#include "voxel_bitmap.h"
#include "voxel_lookup.h"

namespace fquant {
namespace {

// Of input x and offset k on one axis the output is (x + padding - k * dilation) / stride, if that
// is whole. Here x + padding is quotient * stride + residue.
struct Axis {
  int64_t kernel, stride, padding, dilation;

  bool reaches(int64_t residue, int64_t k) const { return (residue - k * dilation) % stride == 0; }
  int64_t offset(int64_t residue, int64_t k) const { return (residue - k * dilation) / stride; }
};

// A window of outputs along the last axis that inputs of one residue reach; taps fall as bits rise.
struct Along {
  int64_t begin;
  Window window;
};

std::vector<Along> windows_along(const Axis& x, int64_t residue) {
  std::vector<Along> all;
  for (int64_t k = x.kernel - 1; k >= 0; --k) {
    if (!x.reaches(residue, k)) continue;
    const int64_t offset = x.offset(residue, k);
    if (all.empty() || offset - all.back().begin >= kWindow) all.push_back({offset, {}});
    all.back().window.add(offset - all.back().begin, k);
  }
  return all;
}

// The inputs of each residue one after the other, last rows first: of equal cells the first row is
// written last, and stays.
struct Inputs {
  std::vector<int64_t> start;
  Rows quotients;
  std::unique_ptr<int32_t[]> row;
};

template <class T>
Inputs by_residue(const T* coords, int64_t count, const std::vector<Axis>& axes, const Frame& f,
                  const Range& range) {
  struct Step {
    uint32_t place, line, residue;
  };
  std::vector<std::vector<Step>> steps(f.axes);  // of every position of every axis
  int64_t residues = 1;
  for (int a = 0; a < f.axes; ++a) {
    const int64_t stride = a == 0 ? 1 : axes[a - 1].stride, pad = a == 0 ? 0 : axes[a - 1].padding;
    for (int64_t x = range.low[a]; x <= range.high[a]; ++x) {
      const int64_t quotient = a == 0 ? x : (x + pad) / stride;
      const uint32_t from_low = static_cast<uint32_t>(quotient - f.low[a]);
      const int64_t residue = a == 0 ? 0 : (x + pad) % stride;
      steps[a].push_back({f.place[a] * from_low, f.line[a] * from_low,
                          static_cast<uint32_t>(residue * residues)});
    }
    residues *= stride;
  }
  const auto step_of = [&](int64_t i) {
    Step sum{0, 0, 0};
    for (int a = 0; a < f.axes; ++a) {
      const Step& step = steps[a][coords[i * f.axes + a] - range.low[a]];
      sum.place += step.place, sum.line += step.line, sum.residue += step.residue;
    }
    return sum;
  };
  std::unique_ptr<Step[]> all(new Step[count]);
  Inputs in;
  in.start.assign(residues + 1, 0);
  for (int64_t i = 0; i < count; ++i) ++in.start[(all[i] = step_of(i)).residue];
  int64_t sum = 0;
  for (int64_t& start : in.start) sum += start, start = sum;
  in.quotients = {std::unique_ptr<uint32_t[]>(new uint32_t[count]),
                  std::unique_ptr<uint32_t[]>(new uint32_t[count])};
  in.row.reset(new int32_t[count]);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = --in.start[all[i].residue];
    in.quotients.place[at] = all[i].place;
    in.quotients.line[at] = all[i].line;
    in.row[at] = static_cast<int32_t>(i);
  }
  return in;
}

}  // namespace

template <class T>
bool input_neighbors(const T* coords, int64_t inputs, const T* out_coords, int64_t outputs,
                     const Geometry& g, int32_t* table, int64_t threads) {
  std::vector<Axis> axes;
  int64_t residues = 1;
  for (int a = 0; a < g.dims; ++a) {
    axes.push_back({g.kernel[a], g.stride[a], g.padding[a], g.dilation[a]});
    if (g.stride[a] > 64 || (residues *= g.stride[a]) > 4096) return false;
  }
  const Axis& last = axes.back();
  const int64_t along = last.kernel, lines = g.taps() / along;
  const int64_t rows = residues / last.stride;  // residues of the axes but the last
  if (inputs >= outputs * rows || residues * lines > inputs + 4096) return false;
  const Range range = range_of(coords, inputs, 1 + g.dims);
  const Range out_range = range_of(out_coords, outputs, 1 + g.dims);
  if (!is_ordinary(range, out_range, g)) return false;
  Range reached = range;
  for (int a = 0; a < g.dims; ++a) {
    const Axis& x = axes[a];
    const int64_t least = range.low[1 + a] + x.padding - (x.kernel - 1) * x.dilation;
    reached.low[1 + a] = least / x.stride - 1;
    reached.high[1 + a] = (range.high[1 + a] + x.padding) / x.stride;
  }
  for (int a = 0; a <= g.dims; ++a) {
    if (range.high[a] - range.low[a] > 4 * inputs + 65536) return false;  // steps of positions
  }
  Frame frame;
  frame.axes = 1 + g.dims;
  if (!make_frame(out_range, reached, outputs, &frame)) return false;
  const Voxels voxels(locate(out_coords, outputs, frame, nullptr), outputs, frame.place_bits);
  if (voxels.crowded() || !voxels.unique()) return false;
  const Inputs in = by_residue(coords, inputs, axes, frame, range);

  std::vector<std::vector<Along>> windows;
  for (int64_t r = 0; r < last.stride; ++r) windows.push_back(windows_along(last, r));
  parallel_for(lines, threads, [&](int64_t, int64_t line) {
    int32_t* to = table + line * along * outputs;
    std::fill_n(to, along * outputs, -1);
    for (int64_t residue = 0; residue < residues; ++residue) {
      bool reached = true;
      uint32_t place = 0, shift = 0;
      for (int64_t a = 0, taps = lines, r = residue; a < g.last(); ++a, r /= axes[a - 1].stride) {
        taps /= axes[a].kernel;
        const int64_t k = line / taps % axes[a].kernel, of_axis = r % axes[a].stride;
        reached &= axes[a].reaches(of_axis, k);
        const uint32_t offset = static_cast<uint32_t>(axes[a].offset(of_axis, k));
        place += frame.place[1 + a] * offset;
        shift += frame.line[1 + a] * offset;
      }
      if (!reached) continue;
      for (const Along& w : windows[residue / rows]) {
        for (int64_t i = in.start[residue]; i < in.start[residue + 1]; i += kGrain) {
          const int64_t count = std::min(kGrain, in.start[residue + 1] - i);
          look_up(voxels, &in.quotients.place[i], place + static_cast<uint32_t>(w.begin),
                  &in.quotients.line[i], shift, count, w.window,
                  [&](int64_t k, int64_t n, int32_t row) {
                    to[k * outputs + row] = in.row[i + n];
                  });
        }
      }
    }
  });
  return true;
}

template bool input_neighbors(const int32_t*, int64_t, const int32_t*, int64_t, const Geometry&,
                              int32_t*, int64_t);
template bool input_neighbors(const int64_t*, int64_t, const int64_t*, int64_t, const Geometry&,
                              int32_t*, int64_t);

}  // namespace fquant
