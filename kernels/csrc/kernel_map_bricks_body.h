// Looking up in bricks, for every path. Included in a namespace of the path's own, because its
// instructions are the path's.

inline int32_t rank_of(const BrickMap& m, int64_t at) {
  return m.before[at >> 6] + count(m.grid[at >> 6] & ((uint64_t{1} << (at & 63)) - 1));
}

// First planes of the bricks nearby.
inline void find_nearby(const BrickMap& m, int64_t brick, uint32_t* to) {
  const uint32_t none = static_cast<uint32_t>(m.bricks) * 8;
  for (int64_t z = -1; z <= 0; ++z) {
    for (int64_t y = -1; y <= 1; ++y, to += 3) {
      const int64_t at = m.place[brick] + z * m.outer + y * m.middle - 1;
      const uint64_t found = bits_from(m.grid, static_cast<uint64_t>(at));
      uint32_t next = static_cast<uint32_t>(rank_of(m, at)) * 8;
      for (int x = 0; x < 3; ++x) {
        const uint32_t present = static_cast<uint32_t>(found >> x & 1);
        to[x] = present != 0 ? next : none;
        next += present * 8;
      }
    }
  }
}

// The 3 x 3 bits of three rows from `bit` on.
inline uint32_t nine_bits(const uint16_t* rows, int bit) {
  uint64_t word;
  std::memcpy(&word, rows, sizeof(word));
  word = word >> bit & 0x000700070007;
  return static_cast<uint32_t>(word * ((uint64_t{1} << 32) + (1 << 19) + (1 << 6)) >> 32) & 511;
}

// A hit is an offset (4 bits), the cell it leads to (10 bits) and a voxel of the brick.
inline void write_hits(const BrickMap& m, const uint32_t* nearby, const BrickSlot* voxels,
                       const uint32_t* hits, int64_t num_hits) {
  for (int64_t n = 0; n < num_hits; ++n) {
    const uint32_t hit = hits[n], offset = hit & 15;
    const BrickCell& cell = m.cells[hit >> 4 & 1023];
    const uint32_t plane = nearby[cell.brick] + cell.plane;
    const uint64_t below = m.bits[plane] & ((uint64_t{1} << cell.bit) - 1);
    const int32_t found = m.slots[m.start[plane] + count(below)].row;
    const int32_t row = voxels[hit >> 14].row;
    m.to[offset][row] = found;
    m.opposite[offset][found] = row;
  }
}
