// Kernel maps of voxels with themselves and offsets of at most one cell per axis, brick by brick.
//
// A brick is 8 x 8 x 8 cells: 512 bits, and a bitmap of the grid's bricks with ranks numbers those
// that hold voxels. So every look-up is exact, and what one brick needs stays in cache. The bits of
// a brick and of its neighbors are laid out as rows of ten cells; the half of a voxel's neighbors
// that comes before it is then 13 bits, from two loads. What is found is written for both voxels.
// Maps of 86k / 110k / 89k voxels, ms (Zen 5): 1.4 / 1.7 / 1.2 with AVX-512, 1.8 / 2.0 / 1.5 with
// AVX2, 2.4 / 2.7 / 2.0 with neither. kernel_map_bitmap.cpp takes 2.2 / 3.4 / 3.1; 0.4 / 0.2 / 0.8
// reads per voxel find another cell's bit there. A million voxels in ten scans: 19, 20 and 26.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "bricks.h"
#include "kernel_map.h"
#include "parallel.h"

namespace fquant {
namespace {

constexpr int64_t kFewVoxels = 1 << 16;  // of batches: fewer are not worth a grid of their own

// Which rows of the table the offsets before the middle one and their opposites have.
void choose_rows(const Geometry& g, int32_t* table, int64_t outputs, BrickMap* m) {
  const int64_t taps = g.taps();
  for (int h = 0; h < kHalf; ++h) {
    const int offset[3] = {h / 9 - 1, h / 3 % 3 - 1, h % 3 - 1};
    int64_t tap = 0, of_axis[kMaxDims] = {};
    bool wanted = true;
    for (int role = 0; role < 3; ++role) {
      const int a = m->axis[role] - 1;
      if (a < 0) {
        wanted &= offset[role] == 0;
      } else {
        of_axis[a] = offset[role] + g.kernel[a] / 2;
        wanted &= of_axis[a] >= 0 && of_axis[a] < g.kernel[a];
      }
    }
    if (!wanted) continue;
    for (int a = 0; a < g.dims; ++a) tap = tap * g.kernel[a] + of_axis[a];
    m->wanted |= uint32_t{1} << h;
    m->step[h] =
        static_cast<int16_t>((offset[0] * kBrickRows + offset[1]) * kBrickRows + offset[2]);
    m->to[h] = table + tap * outputs;
    m->opposite[h] = table + (taps - 1 - tap) * outputs;
  }
}

// The columns of some rows, which have no neighbors among the others.
template <class T>
bool write_columns(const T* coords, int64_t first_row, int64_t last_row, int64_t outputs,
                   const Geometry& g, int32_t* table, int64_t threads) {
  coords += first_row * (1 + g.dims);
  const int64_t count = last_row - first_row, taps = g.taps();
  const Range range = range_of(coords, count, 1 + g.dims);
  BrickVoxels voxels(g.isa);
  voxels.map.first_row = first_row;
  if (!is_ordinary(range, range, g)) return false;
  if (!voxels.make(coords, count, range, g.dims, false)) return false;
  BrickMap& m = voxels.map;
  choose_rows(g, table, outputs, &m);
  parallel_for(taps, threads, [&](int64_t, int64_t k) {
    int32_t* row = table + k * outputs;
    if (k != taps / 2) std::fill(row + first_row, row + last_row, -1);
    for (int64_t i = first_row; k == taps / 2 && i < last_row; ++i) row[i] = static_cast<int32_t>(i);
  });
  const int64_t part = 512, parts = (m.bricks + part - 1) / part;
  parallel_for(parts, threads, [&](int64_t, int64_t task) {
    const int64_t first = task * part, last = std::min(first + part, m.bricks);
    voxels.path.write(m, first, last);
  });
  return true;
}

}  // namespace

template <class T>
bool brick_neighbors(const T* coords, int64_t count, const T* out_coords, int64_t outputs,
                     const Geometry& g, int32_t* table, int64_t threads) {
  if (g.dims > 3 || !g.is_symmetric()) return false;
  if (!are_same(coords, count, out_coords, outputs, g.dims)) return false;
  for (int a = 0; a < g.dims; ++a) {
    if (g.kernel[a] > 3 || (g.kernel[a] == 3 && g.dilation[a] != 1)) return false;
  }
  // Batches one after the other, some at a time: what is made for them stays in cache. A million
  // voxels in ten scans: 20 ms in place of 22 (Zen 5).
  const auto batch = [&](int64_t row) { return coords[row * (1 + g.dims)]; };
  std::vector<int64_t> ends;
  for (int64_t i = 1, begin = 0; i < count && batch(0) < batch(count - 1); ++i) {
    if (batch(i) < batch(i - 1)) {
      ends.clear();
      break;
    }
    if (batch(i) > batch(i - 1) && i - begin >= kFewVoxels) ends.push_back(begin = i);
  }
  ends.push_back(count);
  for (int64_t n = 0, first = 0; n < static_cast<int64_t>(ends.size()); first = ends[n++]) {
    if (!write_columns(coords, first, ends[n], count, g, table, threads)) return false;
  }
  return true;
}

template bool brick_neighbors(const int32_t*, int64_t, const int32_t*, int64_t, const Geometry&,
                              int32_t*, int64_t);
template bool brick_neighbors(const int64_t*, int64_t, const int64_t*, int64_t, const Geometry&,
                              int32_t*, int64_t);

}  // namespace fquant
