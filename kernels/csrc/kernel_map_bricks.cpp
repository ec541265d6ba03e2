// Kernel maps of voxels with themselves and offsets of at most one cell per axis, brick by brick.
//
// A brick is 8 x 8 x 8 cells: 512 bits, and a bitmap of the grid's bricks with ranks numbers those
// that hold voxels. So every look-up is exact, and what one brick needs stays in cache. The bits of
// a brick and of its neighbors are laid out as rows of ten cells; the half of a voxel's neighbors
// that comes before it is then 13 bits, from two loads. What is found is written for both voxels.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>

#include "bits.h"
#include "isa.h"
#include "kernel_map.h"
#include "kernel_map_bricks.h"
#include "parallel.h"
#include "voxel_bitmap.h"

namespace fquant {
namespace {

template <class T>
void mark_cells(const BrickMap& m, const T* coords) {
  const auto mark = [&](int axes) {
    for (int64_t i = 0; i < m.count; ++i) {
      uint32_t at = m.first, cell = 0;
      for (int a = 0; a < axes; ++a) {
        const uint32_t x = static_cast<uint32_t>(coords[i * axes + a] - m.low[a]);
        at += (x >> m.shift[a]) * m.stride[a];
        cell |= (x & m.mask[a]) << m.cell[a];
      }
      m.code[i] = at;
      m.cell_of[i] = static_cast<uint16_t>(cell);
      m.grid[at >> 6] |= uint64_t{1} << (at & 63);
    }
  };
  m.axes == 4 ? mark(4) : mark(m.axes);  // three dimensions: unrolled
}

// Planes -1 to 7 of a brick.
void fill_rows(const uint64_t* bits, const uint32_t* nearby, uint16_t* to) {
  for (int z = -1; z < 8; ++z, to += kPlaneRows) {
    const uint32_t* n = nearby + (z < 0 ? 0 : 9);
    const auto bytes = [&](int i) { return reinterpret_cast<const uint8_t*>(&bits[n[i] + (z & 7)]); };
    const auto row = [](unsigned left, unsigned middle, unsigned right) {
      return static_cast<uint16_t>(left >> 7 | middle << 1 | (right & 1) << 9);
    };
    const uint8_t *left = bytes(3), *middle = bytes(4), *right = bytes(5);
    to[0] = row(bytes(0)[7], bytes(1)[7], bytes(2)[7]);
    for (int y = 0; y < 8; ++y) to[1 + y] = row(left[y], middle[y], right[y]);
    to[9] = row(bytes(6)[0], bytes(7)[0], bytes(8)[0]);
  }
}

// Appends a hit per bit of the mask: the voxel's, with an offset and the cell it leads to.
struct Appender {
  explicit Appender(const BrickMap& m) : map(m) {}
  int64_t operator()(uint32_t mask, uint32_t voxel, uint32_t* to) const {
    const int64_t count = count_bits(mask);
    for (; mask != 0; mask &= mask - 1) {
      const int h = __builtin_ctz(mask);
      *to++ = voxel + static_cast<uint32_t>(map.step[h] * 16 + h);
    }
    return count;
  }
  const BrickMap& map;
};

#include "kernel_map_bricks_body.h"

// Every cell of a brick as a slot, and those of it and around it before its last plane.
struct Cells {
  std::array<BrickSlot, 512> slots;
  std::array<BrickCell, 9 * kBrickRows * kBrickRows> near;

  Cells() {
    for (int z = -1, n = 0; z < 8; ++z) {
      for (int y = -1; y <= 8; ++y) {
        for (int x = -1; x <= 8; ++x, ++n) {
          const int brick = ((z + 8) / 8 * 3 + (y + 8) / 8) * 3 + (x + 8) / 8;
          const int bit = (y & 7) * 8 + (x & 7);
          near[n] = {static_cast<uint8_t>(brick), static_cast<uint8_t>(z & 7),
                     static_cast<uint8_t>(bit), 0};
          if (brick != 13) continue;
          slots[z * 64 + bit] = {0, static_cast<uint16_t>(n),
                                 static_cast<uint8_t>(z * kPlaneRows + y), static_cast<uint8_t>(x)};
        }
      }
    }
  }
};

// Lays out the grid of bricks: row-major with one empty brick between lines, the longest axis
// outermost, so that bricks next to each other are near. order[i] is the axis of role i, or -1.
// False where the grid would be too large.
bool lay_out(const Range& range, BrickMap* m, int* order) {
  int64_t extent[4];
  for (int a = 0; a < m->axes; ++a) {
    m->low[a] = range.low[a];
    extent[a] = range.high[a] - range.low[a] + 1;
    if (extent[a] > int64_t{1} << 31) return false;
  }
  for (int i = 0; i < 3; ++i) order[i] = i < 4 - m->axes ? -1 : i - (3 - m->axes);
  std::stable_sort(order + 4 - m->axes, order + 3,
                   [&](int a, int b) { return extent[a] > extent[b]; });
  const int64_t most = 256 * m->count + 65536;  // bits
  int64_t size = 1, stride[3];
  for (int role = 2; role >= 0; --role) {
    const int a = order[role];
    stride[role] = size;
    size *= (a < 0 ? 1 : (extent[a] + 7) / 8) + 1;
    if (size > most) return false;
    if (a < 0) continue;
    m->stride[a] = static_cast<uint32_t>(stride[role]);
    m->shift[a] = 3, m->mask[a] = 7, m->cell[a] = static_cast<uint32_t>(3 * (2 - role));
  }
  m->outer = stride[0], m->middle = stride[1];
  m->first = static_cast<uint32_t>(m->outer + m->middle + 1);
  m->stride[0] = static_cast<uint32_t>(size);
  if (extent[0] > most || size * extent[0] > std::min(most, int64_t{1} << 31)) return false;
  m->words = (size * extent[0] + 2 * m->first) / 64 + 2;
  return true;
}

// Which rows of the table the offsets before the middle one and their opposites have.
void choose_rows(const Geometry& g, const int* order, int32_t* table, BrickMap* m) {
  const int64_t taps = g.taps();
  for (int h = 0; h < kHalf; ++h) {
    const int offset[3] = {h / 9 - 1, h / 3 % 3 - 1, h % 3 - 1};
    int64_t tap = 0, of_axis[kMaxDims] = {};
    bool wanted = true;
    for (int role = 0; role < 3; ++role) {
      const int a = order[role] - 1;
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
    m->step[h] = static_cast<int16_t>((offset[0] * kBrickRows + offset[1]) * kBrickRows + offset[2]);
    m->to[h] = table + tap * m->count;
    m->opposite[h] = table + (taps - 1 - tap) * m->count;
  }
}

}  // namespace

const BrickPath kBricks{mark, rank, number, order, write};

template <class T>
bool brick_neighbors(const T* coords, int64_t count, const Geometry& g, int32_t* table,
                     int64_t threads) {
  if (g.dims > 3 || !g.is_symmetric()) return false;
  for (int a = 0; a < g.dims; ++a) {
    if (g.kernel[a] > 3 || (g.kernel[a] == 3 && g.dilation[a] != 1)) return false;
  }
  const Range range = range_of(coords, count, 1 + g.dims);
  BrickMap m{};
  m.axes = 1 + g.dims, m.count = count;
  int order[3];
  if (!is_ordinary(range, range, g) || !lay_out(range, &m, order)) return false;
  const BrickPath* path = &kBricks;
#ifdef FQUANT_X86
  if (isa_available(kAvx512Vnni)) path = &kBricksAvx512;
#endif

  std::unique_ptr<uint64_t[]> grid(new uint64_t[m.words]());
  std::unique_ptr<int32_t[]> before(new int32_t[m.words]);
  std::unique_ptr<uint32_t[]> code(new uint32_t[count]);
  std::unique_ptr<uint16_t[]> cell_of(new uint16_t[count]);
  m.grid = grid.get(), m.before = before.get(), m.code = code.get(), m.cell_of = cell_of.get();
  path->mark(m, sizeof(T) == sizeof(int64_t), coords);
  m.bricks = path->rank(m);
  if (m.bricks >= int64_t{1} << 22) return false;
  const int64_t planes = m.bricks * 8 + 8;
  std::unique_ptr<uint32_t[]> place(new uint32_t[m.bricks]);
  std::unique_ptr<uint64_t[]> bits(new uint64_t[planes]());
  m.place = place.get(), m.bits = bits.get();
  if (!path->number(m)) return false;
  std::unique_ptr<int32_t[]> start(new int32_t[planes]);
  std::unique_ptr<BrickSlot[]> slots(new BrickSlot[count]);
  m.start = start.get(), m.slots = slots.get();
  static const Cells cells;
  m.slot_of_cell = cells.slots.data(), m.cells = cells.near.data();
  path->order(m);

  const int64_t taps = g.taps();
  choose_rows(g, order, table, &m);
  parallel_for(taps, threads, [&](int64_t, int64_t k) {
    int32_t* to = table + k * count;
    if (k != taps / 2) std::fill(to, to + count, -1);
    for (int64_t i = 0; k == taps / 2 && i < count; ++i) to[i] = static_cast<int32_t>(i);
  });
  const int64_t part = 512, parts = (m.bricks + part - 1) / part;
  parallel_for(parts, threads, [&](int64_t, int64_t task) {
    path->write(m, task * part, std::min((task + 1) * part, m.bricks));
  });
  return true;
}

template bool brick_neighbors(const int32_t*, int64_t, const Geometry&, int32_t*, int64_t);
template bool brick_neighbors(const int64_t*, int64_t, const Geometry&, int32_t*, int64_t);

}  // namespace fquant
