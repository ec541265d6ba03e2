// Voxels in bricks: the grid of bricks, and the path of every processor.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "bits.h"
#include "bricks.h"
#include "isa.h"

namespace fquant {
namespace {

#include "bricks_portable.h"

inline void fill_rows(const uint64_t* bits, const uint32_t* nearby, uint16_t* to) {
  all_rows(bits, nearby, to);
}

// Appends a hit per bit of the mask: the voxel's, with an offset and the cell it leads to.
struct Appender {
  explicit Appender(const BrickMap& m) {
    for (int h = 0; h < kHalf; ++h) add[h] = static_cast<uint32_t>(m.step[h] * 16 + h);
  }
  int64_t operator()(uint32_t mask, uint32_t voxel, uint32_t* to) const {
    int64_t count = 0;  // without a branch, which would be mispredicted once per voxel
    for (int h = 0; h < kHalf; ++h) {
      to[count] = voxel + add[h];
      count += mask >> h & 1;
    }
    return count;
  }
  uint32_t add[kHalf];
};

#include "bricks_body.h"

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
// outermost, so that bricks next to each other are near.
// False where the grid would be too large.
bool lay_out(const Range& range, BrickMap* m) {
  int* const order = m->axis;
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

}  // namespace

const BrickPath kBricks{mark, rank, number, order, write, write_inputs};

const BrickPath& brick_path(int isa) {
#ifdef FQUANT_X86
  if (isa == kAvx512Vnni) return kBricksAvx512;
  if (isa >= kAvx2) return kBricksAvx2;
#else
  (void)isa;
#endif
  return kBricks;
}

template <class T>
bool BrickVoxels::make(const T* coords, int64_t count, const Range& box, int dims,
                       bool only_rows) {
  if (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__) return false;  // bytes of a plane are its rows
  BrickMap& m = map;
  m.axes = 1 + dims, m.count = count;
  if (!lay_out(box, &m)) return false;
  m.grid = room<uint64_t>(m.words), m.before = room<int32_t>(m.words);
  m.code = room<uint32_t>(count), m.cell_of = room<uint16_t>(count);
  std::memset(m.grid, 0, m.words * sizeof(*m.grid));
  path.mark(m, sizeof(T) == sizeof(int64_t), coords);
  m.bricks = path.rank(m);
  if (m.bricks >= int64_t{1} << 22) return false;
  const int64_t planes = m.bricks * 8 + 8;
  m.bits = room<uint64_t>(planes), m.start = room<int32_t>(planes);
  m.place = room<uint32_t>(m.bricks);
  if (only_rows) {
    m.rows = room<int32_t>(count);
  } else {
    m.slots = room<BrickSlot>(count);
  }
  std::memset(m.bits, 0, planes * sizeof(*m.bits));
  if (!path.number(m)) return false;
  static const Cells cells;
  m.slot_of_cell = cells.slots.data(), m.cells = cells.near.data();
  path.order(m);
  return true;
}

template bool BrickVoxels::make(const int32_t*, int64_t, const Range&, int, bool);
template bool BrickVoxels::make(const int64_t*, int64_t, const Range&, int, bool);

}  // namespace fquant
