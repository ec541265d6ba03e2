// The steps of every path of brick-by-brick kernel maps. Included in a namespace of the path's own,
// because its instructions are the path's, after the path's count_bits(), mark_cells(), fill_rows()
// and Appender.

inline int32_t rank_of(const BrickMap& m, int64_t at) {
  return m.before[at >> 6] + count_bits(m.grid[at >> 6] & ((uint64_t{1} << (at & 63)) - 1));
}

inline int32_t slot_of(const BrickMap& m, uint32_t plane, uint32_t bit) {
  return m.start[plane] + count_bits(m.bits[plane] & ((uint64_t{1} << bit) - 1));
}

void mark(const BrickMap& m, bool is_int64, const void* coords) {
  if (is_int64) {
    mark_cells(m, static_cast<const int64_t*>(coords));
  } else {
    mark_cells(m, static_cast<const int32_t*>(coords));
  }
}

int64_t rank(const BrickMap& m) {
  int64_t sum = 0;
  for (int64_t w = 0; w < m.words; ++w) {
    m.before[w] = static_cast<int32_t>(sum);
    sum += count_bits(m.grid[w]);
  }
  return sum;
}

bool number(const BrickMap& m) {
  uint64_t repeated = 0;
  for (int64_t i = 0; i < m.count; ++i) {
    const uint32_t at = m.code[i], brick = static_cast<uint32_t>(rank_of(m, at));
    m.place[brick] = at;
    const uint32_t code = m.code[i] = brick * 512 + m.cell_of[i];
    const uint64_t bit = uint64_t{1} << (code & 63), old = m.bits[code >> 6];
    repeated |= old & bit;
    m.bits[code >> 6] = old | bit;
  }
  return repeated == 0;
}

void order(const BrickMap& m) {
  int32_t sum = 0;
  for (int64_t plane = 0; plane < m.bricks * 8 + 8; ++plane) {
    m.start[plane] = sum;
    sum += count_bits(m.bits[plane]);
  }
  const auto each = [&](const auto& set) {
    for (int64_t i = 0; i < m.count; ++i) {
      const uint32_t code = m.code[i];
      set(slot_of(m, code >> 6, code & 63), code & 511, static_cast<int32_t>(m.first_row + i));
    }
  };
  if (m.rows != nullptr) {
    each([&](int32_t at, uint32_t, int32_t row) { m.rows[at] = row; });
  } else {
    each([&](int32_t at, uint32_t cell, int32_t row) {
      BrickSlot slot = m.slot_of_cell[cell];
      slot.row = row;
      m.slots[at] = slot;
    });
  }
}

// First planes of the bricks nearby.
inline void find_nearby(const BrickMap& m, int64_t brick, uint32_t* to) {
  const uint32_t none = static_cast<uint32_t>(m.bricks) * 8;
  for (int64_t z = -1; z <= 0; ++z) {
    for (int64_t y = -1; y <= 1; ++y, to += 3) {
      const int64_t at = m.place[brick] + z * m.outer + y * m.middle - 1;
      uint64_t word;
      std::memcpy(&word, reinterpret_cast<const char*>(m.grid) + (at >> 3), sizeof(word));
      uint32_t next = static_cast<uint32_t>(rank_of(m, at)) * 8;
      for (int x = 0; x < 3; ++x) {
        const uint32_t present = static_cast<uint32_t>(word >> (at & 7) >> x & 1);
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

// A hit is a brick of the batch (6 bits), a voxel of the brick (9 bits), the cell it leads to
// (10 bits) and an offset (4 bits).
inline void write_hits(const BrickMap& m, int64_t first, const uint32_t (*nearby)[kNearby],
                       const uint32_t* hits, int64_t num_hits) {
  for (int64_t n = 0; n < num_hits; ++n) {
    const uint32_t hit = hits[n], offset = hit & 15, brick = hit >> 23;
    const BrickCell cell = m.cells[hit >> 4 & 1023];
    const int32_t slot = slot_of(m, nearby[brick][cell.brick] + cell.plane, cell.bit);
    const int32_t found = m.slots[slot].row;
    const int32_t row = m.slots[m.start[(first + brick) * 8] + (hit >> 14 & 511)].row;
    m.to[offset][row] = found;
    m.opposite[offset][found] = row;
  }
}

void write(const BrickMap& m, int64_t first, int64_t last) {
  uint16_t rows[9 * kPlaneRows + 8] = {};
  uint32_t nearby[kBatchBricks][kNearby], hits[kBatchHits + 512 * kHalf + 16];
  const Appender append(m);
  while (first < last) {
    int64_t num_hits = 0, b = 0;
    for (; b < kBatchBricks && first + b < last && num_hits <= kBatchHits; ++b) {
      find_nearby(m, first + b, nearby[b]);
      fill_rows(m.bits, nearby[b], rows);
      const int32_t* start = m.start + (first + b) * 8;
      for (int32_t s = start[0]; s < start[8]; ++s) {
        const BrickSlot slot = m.slots[s];
        const uint16_t* line = rows + slot.line;
        const uint32_t mask =
            (nine_bits(line, slot.bit) | nine_bits(line + kPlaneRows, slot.bit) << 9) & m.wanted;
        const uint32_t voxel = static_cast<uint32_t>(b << 23 | (s - start[0]) << 14);
        num_hits += append(mask, voxel | uint32_t{slot.cell} << 4, hits + num_hits);
      }
    }
    write_hits(m, first, nearby, hits, num_hits);
    first += b;
  }
}

void write_inputs(const BrickMap& m, const BrickInputs& in, int64_t count, uint32_t offsets) {
  constexpr int64_t kInputs = 1024;
  constexpr int64_t kGroup = 256;  // slots asked for before any is read: 10 to 25 % less time
  uint32_t hits[kInputs * 8 + 16];
  const Appender append(m);
  for (int64_t last = count; last > 0; last -= kInputs) {
    const int64_t first = last > kInputs ? last - kInputs : 0;
    int64_t num_hits = 0;
    for (int64_t i = last; i-- > first;) {
      const uint32_t code = static_cast<uint32_t>(in.code[i]);
      const uint32_t voxel = static_cast<uint32_t>(i - first) << 14 | (code & 1023) << 4;
      num_hits += append(in.wanted[code >> 16] & offsets, voxel, hits + num_hits);
    }
    for (int64_t begin = 0; begin < num_hits; begin += kGroup) {
      const uint32_t* some = hits + begin;
      const int64_t num = num_hits - begin < kGroup ? num_hits - begin : kGroup;
      int32_t slots[kGroup];
      uint32_t kept[kGroup];
      int64_t num_kept = 0;
      for (int64_t n = 0; n < num; ++n) {
        const BrickCell cell = m.cells[some[n] >> 4 & 1023];
        const int64_t i = first + (some[n] >> 14);
        const int64_t at = static_cast<int64_t>(in.code[i] >> 32) + in.away[cell.brick];
        if ((m.grid[at >> 6] >> (at & 63) & 1) == 0) continue;
        const uint32_t plane = static_cast<uint32_t>(rank_of(m, at)) * 8 + cell.plane;
        if ((m.bits[plane] >> cell.bit & 1) == 0) continue;
        slots[num_kept] = slot_of(m, plane, cell.bit);
        kept[num_kept] = some[n];
        __builtin_prefetch(&m.rows[slots[num_kept++]]);
      }
      for (int64_t n = 0; n < num_kept; ++n) {
        const int64_t residue = in.code[first + (kept[n] >> 14)] >> 16 & 0xffff;
        int32_t* to = in.to[residue * 8 + (kept[n] & 15)];
        to[m.rows[slots[n]]] = static_cast<int32_t>(first + (kept[n] >> 14));
      }
    }
  }
}
