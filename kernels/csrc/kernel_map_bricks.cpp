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
#include <vector>

#include "bits.h"
#include "isa.h"
#include "kernel_map.h"
#include "kernel_map_bricks.h"
#include "parallel.h"
#include "voxel_bitmap.h"

namespace fquant {
namespace {

const BrickCell* brick_cells() {
  static const auto cells = [] {
    std::array<BrickCell, 9 * kBrickRows * kBrickRows> all;
    for (int z = -1, n = 0; z < 8; ++z) {
      for (int y = -1; y <= 8; ++y) {
        for (int x = -1; x <= 8; ++x) {
          const int brick = ((z + 8) / 8 * 3 + (y + 8) / 8) * 3 + (x + 8) / 8;
          all[n++] = {static_cast<uint8_t>(brick), static_cast<uint8_t>(z & 7),
                      static_cast<uint8_t>((y & 7) * 8 + (x & 7)), 0};
        }
      }
    }
    return all;
  }();
  return cells.data();
}

// How coordinates become bricks of the grid, row-major with one empty brick between lines, and cells.
struct Grid {
  int axes;
  int64_t size;  // places of bricks
  int64_t low[4];
  uint32_t stride[4];   // of bricks
  int shift[4];         // of cells per brick: the batch axis has one
  int cell[4];          // place of a cell's three bits
  int64_t outer, middle;  // strides of the axes above the innermost
  int order[3];           // the axis of every role, outermost first; -1 for none

  bool make(const Range& range, int dims, int64_t count) {
    axes = 1 + dims;
    // The longest axis outermost: what neighbors share is nearest then.
    int64_t extent[4];
    for (int a = 0; a < axes; ++a) {
      low[a] = range.low[a];
      if (range.high[a] - low[a] > int64_t{1} << 31) return false;
      extent[a] = range.high[a] - low[a] + 1;
    }
    int along[3] = {-1, -1, -1};
    for (int a = 1; a < axes; ++a) along[3 - axes + a] = a;
    std::stable_sort(along + 4 - axes, along + 3,
                     [&](int a, int b) { return extent[a] > extent[b]; });
    const int64_t most = 256 * count + 65536;
    int64_t stride_of[3];
    size = 1;
    for (int role = 2; role >= 0; --role) {
      const int a = order[role] = along[role];
      stride_of[role] = size;
      size *= (a < 0 ? 1 : (extent[a] + 7) / 8) + 1;
      if (size > most) return false;
      if (a < 0) continue;
      stride[a] = static_cast<uint32_t>(stride_of[role]);
      shift[a] = 3;
      cell[a] = 3 * (2 - role);
    }
    outer = stride_of[0], middle = stride_of[1];
    stride[0] = static_cast<uint32_t>(size);
    shift[0] = cell[0] = 0;
    if (extent[0] > most) return false;
    size *= extent[0];
    return size <= most;
  }
};

class Bricks {
 public:
  template <class T>
  bool make(const T* coords, int64_t count, const Grid& g) {
    lead_ = g.outer + g.middle + 1;
    outer_ = g.outer, middle_ = g.middle;
    const int64_t words = (g.size + 2 * lead_) / 64 + 2;
    grid_.assign(words, 0);
    std::unique_ptr<uint32_t[]> code(new uint32_t[count]);
    std::unique_ptr<uint16_t[]> cells(new uint16_t[count]);
    const auto locate = [&](int axes) {
      for (int64_t i = 0; i < count; ++i) {
        uint32_t at = static_cast<uint32_t>(lead_), cell = 0;
        for (int a = 0; a < axes; ++a) {
          const uint32_t x = static_cast<uint32_t>(coords[i * axes + a] - g.low[a]);
          at += (x >> g.shift[a]) * g.stride[a];
          if (a > 0) cell |= (x & 7) << g.cell[a];
        }
        code[i] = at;
        cells[i] = static_cast<uint16_t>(cell);
        grid_[at >> 6] |= uint64_t{1} << (at & 63);
      }
    };
    g.axes == 4 ? locate(4) : locate(g.axes);
    before_.reset(new int32_t[words]);
    count_ = 0;
    for (int64_t w = 0; w < words; ++w) {
      before_[w] = static_cast<int32_t>(count_);
      count_ += count_bits(grid_[w]);
    }
    if (count_ >= int64_t{1} << 22) return false;
    place_.reset(new uint32_t[count_]);
    bits_.assign((count_ + 1) * 8, 0);  // and a brick of no voxels
    uint64_t repeated = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t at = code[i];
      const uint32_t brick = static_cast<uint32_t>(rank(at));
      place_[brick] = at;
      code[i] = brick * 512 + cells[i];
      uint64_t* word = &bits_[code[i] >> 6];
      const uint64_t bit = uint64_t{1} << (code[i] & 63);
      repeated |= *word & bit;
      *word |= bit;
    }
    if (repeated != 0) return false;
    start_.reset(new int32_t[count_ * 8 + 8]);
    int32_t sum = 0;
    for (int64_t p = 0; p < count_ * 8 + 8; ++p) {
      start_[p] = sum;
      sum += count_bits(bits_[p]);
    }
    std::array<BrickSlot, 512> of_cell;
    for (int c = 0; c < 512; ++c) {
      const int z = c >> 6, y = c >> 3 & 7, x = c & 7;
      of_cell[c] = {0, static_cast<uint16_t>(((z + 1) * kBrickRows + y + 1) * kBrickRows + x + 1),
                    static_cast<uint8_t>(z * 16 + y), static_cast<uint8_t>(x)};
    }
    slots_.reset(new BrickSlot[count]);
    for (int64_t i = 0; i < count; ++i) {
      BrickSlot slot = of_cell[code[i] & 511];
      slot.row = static_cast<int32_t>(i);
      slots_[slot_of(code[i] >> 6, code[i] & 63)] = slot;
    }
    return true;
  }

  void describe(BrickMap* m) const {
    m->grid = grid_.data(), m->before = before_.get(), m->place = place_.get();
    m->outer = outer_, m->middle = middle_;
    m->bits = bits_.data(), m->start = start_.get(), m->slots = slots_.get();
    m->bricks = count_;
  }

 private:
  int32_t slot_of(uint32_t plane, uint32_t bit) const {
    return start_[plane] + count_bits(bits_[plane] & ((uint64_t{1} << bit) - 1));
  }
  int32_t rank(uint32_t at) const {
    return before_[at >> 6] + count_bits(grid_[at >> 6] & ((uint64_t{1} << (at & 63)) - 1));
  }

  int64_t lead_, outer_, middle_, count_;
  std::vector<uint64_t> grid_;
  std::unique_ptr<int32_t[]> before_;
  std::unique_ptr<uint32_t[]> place_;  // of every brick in the grid
  std::vector<uint64_t> bits_;         // eight planes per brick
  std::unique_ptr<int32_t[]> start_;   // first slot of every plane
  std::unique_ptr<BrickSlot[]> slots_;
};

inline int32_t count(uint64_t x) { return count_bits(x); }

#include "kernel_map_bricks_body.h"

// Planes -1 to 7 of ten rows each, of ten cells each.
void fill_rows(const BrickMap& m, const uint32_t* nearby, uint16_t* to) {
  for (int z = -1; z < 8; ++z, to += 16) {
    const uint32_t* n = nearby + (z < 0 ? 0 : 9);
    const auto bytes = [&](int i) {
      return reinterpret_cast<const uint8_t*>(&m.bits[n[i] + (z & 7)]);
    };
    const auto row = [](unsigned left, unsigned middle, unsigned right) {
      return static_cast<uint16_t>(left >> 7 | middle << 1 | (right & 1) << 9);
    };
    const uint8_t *left = bytes(3), *middle = bytes(4), *right = bytes(5);
    to[0] = row(bytes(0)[7], bytes(1)[7], bytes(2)[7]);
    for (int y = 0; y < 8; ++y) to[1 + y] = row(left[y], middle[y], right[y]);
    to[9] = row(bytes(6)[0], bytes(7)[0], bytes(8)[0]);
  }
}

}  // namespace

void write_bricks(const BrickMap& m, int64_t first, int64_t last) {
  uint16_t rows[9 * 16 + 8] = {};
  uint32_t nearby[kNearby], hits[512 * kHalf];
  for (int64_t b = first; b < last; ++b) {
    find_nearby(m, b, nearby);
    fill_rows(m, nearby, rows);
    const BrickSlot* voxels = m.slots + m.start[b * 8];
    const int64_t end = m.start[b * 8 + 8] - m.start[b * 8];
    int64_t num_hits = 0;
    for (int64_t v = 0; v < end; ++v) {
      const BrickSlot& slot = voxels[v];
      const uint16_t* line = rows + slot.line;
      uint32_t mask =
          (nine_bits(line, slot.bit) | nine_bits(line + 16, slot.bit) << 9) & m.wanted;
      for (; mask != 0; mask &= mask - 1) {
        const uint32_t h = static_cast<uint32_t>(__builtin_ctz(mask));
        hits[num_hits++] = static_cast<uint32_t>(v << 14 | (slot.cell + m.step[h]) << 4) | h;
      }
    }
    write_hits(m, nearby, voxels, hits, num_hits);
  }
}

template <class T>
bool brick_neighbors(const T* coords, int64_t count, const Geometry& g, int32_t* table,
                     int64_t threads) {
  if (g.dims > 3 || !g.is_symmetric()) return false;
  for (int a = 0; a < g.dims; ++a) {
    if (g.kernel[a] > 3 || (g.kernel[a] == 3 && g.dilation[a] != 1)) return false;
  }
  const Range range = range_of(coords, count, 1 + g.dims);
  Grid grid;
  Bricks bricks;
  if (!is_ordinary(range, range, g) || !grid.make(range, g.dims, count)) return false;
  if (!bricks.make(coords, count, grid)) return false;

  const int64_t all = g.taps();
  BrickMap map{};
  bricks.describe(&map);
  map.cells = brick_cells();
  for (int h = 0; h < kHalf; ++h) {
    const int offset[3] = {h / 9 - 1, h / 3 % 3 - 1, h % 3 - 1};
    int64_t tap = 0, of_axis[kMaxDims] = {};
    bool wanted = true;
    for (int role = 0; role < 3; ++role) {
      const int a = grid.order[role] - 1;
      if (a < 0) {
        wanted &= offset[role] == 0;
      } else {
        of_axis[a] = offset[role] + g.kernel[a] / 2;
        wanted &= of_axis[a] >= 0 && of_axis[a] < g.kernel[a];
      }
    }
    for (int a = 0; a < g.dims; ++a) tap = tap * g.kernel[a] + of_axis[a];
    if (!wanted) continue;
    map.wanted |= uint32_t{1} << h;
    map.step[h] = static_cast<int16_t>((offset[0] * kBrickRows + offset[1]) * kBrickRows + offset[2]);
    map.to[h] = table + tap * count;
    map.opposite[h] = table + (all - 1 - tap) * count;
  }
  parallel_for(all, threads, [&](int64_t, int64_t k) {
    int32_t* to = table + k * count;
    if (k != all / 2) std::fill(to, to + count, -1);
    for (int64_t i = 0; k == all / 2 && i < count; ++i) to[i] = static_cast<int32_t>(i);
  });
  const int64_t part = 512, parts = (map.bricks + part - 1) / part;
  auto write = write_bricks;
#ifdef FQUANT_X86
  if (isa_available(kAvx512Vnni)) write = write_bricks_avx512;
#endif
  parallel_for(parts, threads, [&](int64_t, int64_t task) {
    write(map, task * part, std::min((task + 1) * part, map.bricks));
  });
  return true;
}

template bool brick_neighbors(const int32_t*, int64_t, const Geometry&, int32_t*, int64_t);
template bool brick_neighbors(const int64_t*, int64_t, const Geometry&, int32_t*, int64_t);

}  // namespace fquant
