// Voxels in bricks, and what the paths of kernel maps by bricks share with their drivers; see
// kernel_map_bricks.cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "coord_range.h"

namespace fquant {

constexpr int kHalf = 13;        // offsets before the middle one
constexpr int kNearby = 18;      // bricks that hold cells before those of a brick
constexpr int kBrickRows = 10;   // of cells per plane: eight and one on either side
constexpr int kPlaneRows = 16;   // of a plane, with room
constexpr int kBatchBricks = 64;
constexpr int kBatchHits = 4096;  // of a batch of bricks, before the last one's

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

// Voxels in bricks of 8 x 8 x 8 cells, and the table to write. A brick is at a place of the grid of
// bricks, which is linear in the coordinates.
struct BrickMap {
  int axes;
  int axis[3];              // of the coordinates, outermost of the grid first; -1 for none
  int64_t low[4];
  uint32_t first;                        // the place of the brick of `low`
  uint32_t stride[4], shift[4], mask[4], cell[4];  // of coordinates: places, and cells in a brick
  int64_t count, words, bricks;          // voxels, words of `grid`, bricks with voxels
  int64_t first_row;                     // of the voxels
  int64_t outer, middle;                 // strides of places
  uint64_t* grid;                        // which places have voxels
  int32_t* before;                       // how many do before each word
  uint32_t* code;                        // of every voxel: its place, then its brick and cell
  uint16_t* cell_of;                     // of every voxel
  uint32_t* place;                       // of every brick
  uint64_t* bits;                        // eight planes of every brick, and of one without voxels
  int32_t* start;                        // first slot of every plane
  BrickSlot* slots;                      // of all voxels, or
  int32_t* rows;                         // only their rows

  const BrickCell* cells;   // planes -1 to 7, rows -1 to 8, columns -1 to 8
  const BrickSlot* slot_of_cell;
  int16_t step[kHalf];      // what an offset adds to a cell
  uint32_t wanted;          // offsets the kernel has: bits
  int32_t *to[kHalf], *opposite[kHalf];  // their rows of the table
};

// Inputs of a strided map. A code is the place of a brick of outputs (32 bits), a residue (16 bits)
// and a cell of the brick, as BrickCells count; it reads outputs at the cell and before it, and the
// offset of an output is a bit per axis.
struct BrickInputs {
  const uint64_t* code;
  const uint8_t* wanted;         // offsets of every residue: bits
  int32_t* const* to;            // rows of the table of every residue and offset
  int64_t away[kNearby];         // places from a brick to those nearby
};

// The steps, in order; between them the driver makes room for what the next one fills.
struct BrickPath {
  void (*mark)(const BrickMap&, bool is_int64, const void* coords);  // code, cell_of, grid
  int64_t (*rank)(const BrickMap&);   // before; how many bricks
  bool (*number)(const BrickMap&);    // place, bits, code; whether voxels differ
  void (*order)(const BrickMap&);     // start, and slots or rows
  void (*write)(const BrickMap&, int64_t first_brick, int64_t last_brick);
  // Last inputs first: of equal ones the first stays.
  void (*write_inputs)(const BrickMap&, const BrickInputs&, int64_t count, uint32_t offsets);
};
extern const BrickPath kBricks;
#ifdef FQUANT_X86
extern const BrickPath kBricksAvx2, kBricksAvx512;
#endif
const BrickPath& brick_path(int isa);

// Voxels in bricks of a grid around a box that holds them and all cells to look for.
class BrickVoxels {
 public:
  explicit BrickVoxels(int isa) : path(brick_path(isa)) {}

  const BrickPath& path;
  BrickMap map{};

  // False where the grid would be too large, or voxels are repeated.
  template <class T>
  bool make(const T* coords, int64_t count, const Range& box, int dims, bool only_rows);

 private:
  template <class T>
  T* room(int64_t count) {
    rooms_.emplace_back(new char[count * sizeof(T)]);
    return reinterpret_cast<T*>(rooms_.back().get());
  }

  std::vector<std::unique_ptr<char[]>> rooms_;
};

}  // namespace fquant
