// What the paths of brick-by-brick kernel maps share with their driver; see kernel_map_bricks.cpp.
#pragma once

#include <cstdint>

namespace fquant {

constexpr int kHalf = 13;       // offsets before the middle one
constexpr int kNearby = 18;     // bricks that hold cells before those of a brick
constexpr int kBrickRows = 10;  // of cells per plane: eight and one on either side

// A cell of a brick or next to it: its brick of the nearby ones, and its plane and bit there.
struct BrickCell {
  uint8_t brick, plane, bit, unused;
};

// A voxel in the order of bricks.
struct BrickSlot {
  int32_t row;
  uint16_t cell;      // into BrickMap::cells
  uint8_t line, bit;  // of the rows of its brick
};

// Voxels in bricks of 8 x 8 x 8 cells, and the table to write.
struct BrickMap {
  const uint64_t* grid;     // which bricks of the grid hold voxels
  const int32_t* before;    // ranks of its words
  int64_t outer, middle;    // strides of the grid
  const uint32_t* place;    // of every brick in the grid
  const uint64_t* bits;     // eight planes of every brick; the last brick is empty
  const int32_t* start;     // first slot of every plane
  const BrickSlot* slots;
  int64_t bricks;
  const BrickCell* cells;   // planes -1 to 7, rows -1 to 8, columns -1 to 8
  int16_t step[kHalf];      // what an offset adds to a cell
  uint32_t wanted;          // offsets the kernel has: bits
  int32_t *to[kHalf], *opposite[kHalf];  // their rows of the table
};

// Finds the neighbors of the voxels of bricks [first, last).
void write_bricks(const BrickMap& map, int64_t first, int64_t last);
#ifdef FQUANT_X86
void write_bricks_avx512(const BrickMap& map, int64_t first, int64_t last);
#endif

}  // namespace fquant
