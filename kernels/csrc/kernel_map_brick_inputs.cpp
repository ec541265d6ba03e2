// Kernel maps with strides, by looking up in bricks which outputs read every input.
//
// Where kernels are at most twice as long as strides, an input is read, along an axis, by the
// output at its quotient and perhaps by the one before: up to eight, nearly all of which are there.
// Maps of stride 2, 86k / 110k / 89k voxels, ms (Zen 5): 2.4 / 2.4 / 2.1 against 3.3 / 3.1 / 2.8 of
// kernel_map_inputs.cpp; a batch of ten scans 34 against 79.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "bricks.h"
#include "kernel_map.h"
#include "parallel.h"

namespace fquant {
namespace {

// Of input x the quotient and residue are those of x + padding by stride. Its output at
// quotient - j reads it at offset k where k * dilation = residue + j * stride.
struct Axis {
  int64_t kernel, stride, padding, dilation;

  // The offset at which the output `j` before the quotient reads, or -1.
  int64_t offset(int64_t residue, int64_t j) const {
    const int64_t from = residue + j * stride;
    return from % dilation == 0 && from / dilation < kernel ? from / dilation : -1;
  }
  bool suits() const { return (kernel - 1) * dilation < 2 * stride; }
};

}  // namespace

template <class T>
bool brick_input_neighbors(const T* coords, int64_t inputs, const T* out_coords, int64_t outputs,
                           const Geometry& g, int32_t* table, int64_t threads) {
  if (g.dims > 3) return false;
  std::vector<Axis> axes;
  int64_t residues = 1;
  for (int a = 0; a < g.dims; ++a) {
    axes.push_back({g.kernel[a], g.stride[a], g.padding[a], g.dilation[a]});
    if (g.stride[a] > 64 || (residues *= g.stride[a]) > 4096 || !axes[a].suits()) return false;
  }
  const Range range = range_of(coords, inputs, 1 + g.dims);
  Range box = range_of(out_coords, outputs, 1 + g.dims);
  if (!is_ordinary(range, box, g)) return false;
  for (int a = 0; a <= g.dims; ++a) {
    const int64_t stride = a == 0 ? 1 : axes[a - 1].stride, pad = a == 0 ? 0 : axes[a - 1].padding;
    box.low[a] = std::min(box.low[a], (range.low[a] + pad) / stride - (range.low[a] < 0));
    box.high[a] = std::max(box.high[a], (range.high[a] + pad) / stride);
    if (range.high[a] - range.low[a] > 4 * inputs + 65536) return false;  // codes of positions
  }
  BrickVoxels voxels(g.isa);
  if (!voxels.make(out_coords, outputs, box, g.dims, true)) return false;
  BrickMap& m = voxels.map;

  // Codes are sums over axes of what a position adds.
  std::vector<uint64_t> of_position[4];
  for (int a = 0, of_residue = 1; a <= g.dims; ++a) {
    const int64_t stride = a == 0 ? 1 : axes[a - 1].stride, pad = a == 0 ? 0 : axes[a - 1].padding;
    const uint64_t cell = a == m.axis[0]   ? kBrickRows * kBrickRows
                          : a == m.axis[1] ? kBrickRows
                                           : a == m.axis[2];
    of_position[a].reserve(range.high[a] - range.low[a] + 1);
    for (int64_t x = range.low[a]; x <= range.high[a]; ++x) {
      const int64_t quotient = a == 0 ? x : (x + pad) / stride;
      const uint64_t at = static_cast<uint64_t>(quotient - m.low[a]);
      const uint64_t residue = static_cast<uint64_t>(a == 0 ? 0 : (x + pad) % stride) * of_residue;
      of_position[a].push_back((at >> m.shift[a]) * m.stride[a] << 32 | residue << 16 |
                               (at & m.mask[a]) * cell);
    }
    of_residue *= static_cast<int>(stride);
  }
  const uint64_t corner = uint64_t{m.first} << 32 | ((kBrickRows + 1) * kBrickRows + 1);
  std::unique_ptr<uint64_t[]> code(new uint64_t[inputs]);
  const auto fill = [&](int of) {
    for (int64_t i = 0; i < inputs; ++i) {
      uint64_t sum = corner;
      for (int a = 0; a < of; ++a) sum += of_position[a][coords[i * of + a] - range.low[a]];
      code[i] = sum;
    }
  };
  m.axes == 4 ? fill(4) : fill(m.axes);  // three dimensions: unrolled

  std::vector<uint8_t> wanted(residues, 0);
  std::vector<int32_t*> to(residues * 8, nullptr);
  for (int j = 0; j < 8; ++j) {
    int64_t before[4] = {};  // of every axis
    for (int role = 0; role < 3; ++role) {
      if (m.axis[role] >= 0) before[m.axis[role]] = j >> (2 - role) & 1;
    }
    m.step[j] =
        static_cast<int16_t>(-((j >> 2) * kBrickRows + (j >> 1 & 1)) * kBrickRows - (j & 1));
    for (int64_t r = 0; r < residues; ++r) {
      int64_t tap = 0, rest = r;
      bool reads = (m.axis[0] >= 0 || j < 4) && (m.axis[1] >= 0 || j < 2);
      for (int a = 0; a < g.dims; rest /= axes[a++].stride) {
        const int64_t k = axes[a].offset(rest % axes[a].stride, before[a + 1]);
        reads &= k >= 0;
        tap = tap * axes[a].kernel + k;
      }
      if (!reads) continue;
      wanted[r] |= static_cast<uint8_t>(1 << j);
      to[r * 8 + j] = table + tap * outputs;
    }
  }
  BrickInputs in{code.get(), wanted.data(), to.data(), {}};
  for (int n = 0; n < kNearby; ++n) {
    in.away[n] = (n / 9 - 1) * m.outer + (n / 3 % 3 - 1) * m.middle + n % 3 - 1;
  }
  parallel_for(g.taps(), threads, [&](int64_t, int64_t k) {
    std::fill(table + k * outputs, table + (k + 1) * outputs, -1);
  });
  if (threads == 1) {
    voxels.path.write_inputs(m, in, inputs, 255);
  } else {  // no two offsets write to one place
    parallel_for(8, threads, [&](int64_t, int64_t j) {
      voxels.path.write_inputs(m, in, inputs, uint32_t{1} << j);
    });
  }
  return true;
}

template bool brick_input_neighbors(const int32_t*, int64_t, const int32_t*, int64_t,
                                    const Geometry&, int32_t*, int64_t);
template bool brick_input_neighbors(const int64_t*, int64_t, const int64_t*, int64_t,
                                    const Geometry&, int32_t*, int64_t);

}  // namespace fquant
