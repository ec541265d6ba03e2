// Kernel maps of strided convolutions, by looking up which outputs read every input.
//
// With stride 2 an input is read by one or two offsets of an axis, whatever the grid: 3.4 of 27 in
// three dimensions, nearly all of them by outputs that exist. The other way round, 27 reads of every
// output are looked up, and 1.8 to 3 of them find something.
#include "scatter.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace fquant {
namespace {

// Per axis and offset, the output position that reads each input position, from the frame's low
// end; -1 for none.
struct Quotients {
  std::vector<int32_t> of[kMaxDims];
  int64_t extent[kMaxDims];

  const int32_t* row(int axis, int64_t k) const { return of[axis].data() + k * extent[axis]; }
};

// Looks up the inputs, last to first, for one line of offsets: of equal inputs the first one counts.
template <class T>
class Scatter {
 public:
  Scatter(const T* coords, int64_t inputs, const Range& range, const Voxels& voxels, int64_t outputs,
          const Frame& f, const Geometry& g, const Quotients& q, int32_t* table)
      : coords_(coords), inputs_(inputs), range_(range), voxels_(voxels), outputs_(outputs), f_(f),
        g_(g), q_(q), table_(table) {}

  void run(int64_t line) const {
    const int64_t along = g_.kernel[g_.last()];
    const int32_t* quotient[kAxes];
    for (int64_t a = g_.last() - 1, rest = line; a >= 0; --a) {
      quotient[a] = q_.row(static_cast<int>(a), rest % g_.kernel[a]);
      rest /= g_.kernel[a];
    }
    Found found[kGrain];
    for (int64_t end = inputs_; end > 0; end -= std::min(end, kGrain)) {
      const int64_t begin = std::max<int64_t>(end - kGrain, 0);
      const int64_t count = g_.dims == 3 ? select_inputs(begin, end, 3, quotient, found)
                                         : select_inputs(begin, end, g_.dims, quotient, found);
      for (int64_t k = 0; k < along; ++k) {
        write(found, count, q_.row(g_.last(), k), table_ + (line * along + k) * outputs_);
      }
    }
  }

 private:
  struct Found {
    uint32_t place, line;
    int32_t row, x;
  };

  // Inputs that some output reads as far as all axes but the last are concerned.
  int64_t select_inputs(int64_t begin, int64_t end, int dims, const int32_t* const* quotient,
                        Found* found) const {
    int64_t count = 0;
    for (int64_t i = end; i-- > begin;) {
      const T* row = coords_ + i * (1 + dims);
      const uint32_t batch = static_cast<uint32_t>(row[0] - f_.low[0]);
      uint32_t place = batch * f_.place[0], line = batch * f_.line[0];
      int32_t least = 0;
      for (int a = 1; a < dims; ++a) {
        const int32_t o = quotient[a - 1][row[a] - range_.low[a]];
        least |= o;
        place += static_cast<uint32_t>(o) * f_.place[a];
        line += static_cast<uint32_t>(o) * f_.line[a];
      }
      const int32_t x = static_cast<int32_t>(row[dims] - range_.low[dims]);
      found[count] = {place, line, static_cast<int32_t>(i), x};
      count += least >= 0;
    }
    return count;
  }

  void write(const Found* found, int64_t count, const int32_t* quotient, int32_t* to) const {
    uint16_t picked[kGrain];
    uint32_t place[kGrain];
    int32_t ranks[kGrain];
    int64_t num = 0;
    for (int64_t n = 0; n < count; ++n) {
      const int32_t o = quotient[found[n].x];
      picked[num] = static_cast<uint16_t>(n);
      place[num] = found[n].place + static_cast<uint32_t>(o);
      num += o >= 0;
    }
    for (int64_t n = 0; n < num; ++n) voxels_.prepare(place[n]);
    for (int64_t n = 0; n < num; ++n) ranks[n] = voxels_.rank(place[n]);
    int32_t unused = 0;
    int64_t num_shared = 0;
    for (int64_t n = 0; n < num; ++n) {
      const Found& input = found[picked[n]];
      const bool present = voxels_.window(place[n]) & 1;
      const int32_t output = voxels_.find(ranks[n], input.line, present);
      *select(output >= 0, to, output, &unused) = input.row;
      ranks[num_shared] = output;
      picked[num_shared] = picked[n];
      num_shared += output < -1;
    }
    for (int64_t n = 0; n < num_shared; ++n) {
      const Found& input = found[picked[n]];
      const int32_t output = voxels_.find_shared(ranks[n], input.line);
      if (output >= 0) to[output] = input.row;
    }
  }

  const T* coords_;
  int64_t inputs_;
  const Range& range_;
  const Voxels& voxels_;
  int64_t outputs_;
  const Frame& f_;
  const Geometry& g_;
  const Quotients& q_;
  int32_t* table_;
};

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

}  // namespace

template <class T>
bool scatter_neighbors(const T* coords, int64_t inputs, const Range& in_range, const T* out_coords,
                       int64_t outputs, const Range& out_range, const Geometry& g, int32_t* table,
                       int64_t threads) {
  Range readers = in_range;
  for (int a = 1; a <= g.dims; ++a) {
    const int s = a - 1;
    const int64_t extent = in_range.high[a] - in_range.low[a] + 1;
    if (extent > (4 * inputs + 65536) / g.kernel[s]) return false;
    const int64_t reach = (g.kernel[s] - 1) * g.dilation[s] - g.padding[s];
    readers.low[a] = floor_div(in_range.low[a] - reach, g.stride[s]);
    readers.high[a] = floor_div(in_range.high[a] + g.padding[s], g.stride[s]);
  }
  Frame frame;
  frame.axes = 1 + g.dims;
  if (!make_frame(out_range, readers, outputs, &frame)) return false;
  for (int a = 1; a <= g.dims; ++a) {  // positions are int32 here
    if (std::max(out_range.high[a], readers.high[a]) - frame.low[a] >= INT32_MAX) return false;
  }
  Quotients q;
  for (int s = 0; s < g.dims; ++s) {
    q.extent[s] = in_range.high[1 + s] - in_range.low[1 + s] + 1;
    q.of[s].assign(g.kernel[s] * q.extent[s], -1);
    for (int64_t k = 0; k < g.kernel[s]; ++k) {
      for (int64_t x = 0; x < q.extent[s]; ++x) {
        const int64_t at = in_range.low[1 + s] + x + g.padding[s] - k * g.dilation[s];
        const int64_t o = floor_div(at, g.stride[s]);
        if (o * g.stride[s] != at) continue;
        q.of[s][k * q.extent[s] + x] = static_cast<int32_t>(o - frame.low[1 + s]);
      }
    }
  }
  const Rows rows = locate(out_coords, outputs, frame, nullptr);
  const Voxels voxels(rows, outputs, frame.place_bits);
  if (voxels.crowded() || !voxels.unique()) return false;

  const int64_t along = g.kernel[g.last()], lines = g.taps() / along;
  const Scatter<T> scatter(coords, inputs, in_range, voxels, outputs, frame, g, q, table);
  parallel_for(lines, threads, [&](int64_t, int64_t line) {
    int32_t* to = table + line * along * outputs;
    std::fill(to, to + along * outputs, -1);
    scatter.run(line);
  });
  return true;
}

template bool scatter_neighbors(const int32_t*, int64_t, const Range&, const int32_t*, int64_t,
                                const Range&, const Geometry&, int32_t*, int64_t);
template bool scatter_neighbors(const int64_t*, int64_t, const Range&, const int64_t*, int64_t,
                                const Range&, const Geometry&, int32_t*, int64_t);

}  // namespace fquant
