// Steps of brick paths in plain C++. Included in a namespace of the path's own, as bricks_body.h.

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

// Rows -1 to 8 of a plane, each of columns -1 to 8, from the planes of nine bricks.
inline void plane_rows(const uint64_t* bits, const uint32_t* nearby, int plane, uint16_t* to) {
  typedef uint8_t Bytes __attribute__((vector_size(8)));
  typedef uint16_t Words __attribute__((vector_size(16)));
  const auto bytes = [&](int i) {
    return reinterpret_cast<const uint8_t*>(&bits[nearby[i] + plane]);
  };
  const auto words = [&](int i) {
    Bytes eight;
    std::memcpy(&eight, bytes(i), sizeof(eight));
    return __builtin_convertvector(eight, Words);
  };
  const auto row = [](unsigned left, unsigned middle, unsigned right) {
    return static_cast<uint16_t>(left >> 7 | middle << 1 | (right & 1) << 9);
  };
  const Words rows = words(3) >> 7 | words(4) << 1 | (words(5) & 1) << 9;
  to[0] = row(bytes(0)[7], bytes(1)[7], bytes(2)[7]);
  std::memcpy(to + 1, &rows, sizeof(rows));
  to[9] = row(bytes(6)[0], bytes(7)[0], bytes(8)[0]);
}

// Planes -1 to 7 of a brick.
inline void all_rows(const uint64_t* bits, const uint32_t* nearby, uint16_t* to) {
  plane_rows(bits, nearby, 7, to);
  for (int z = 0; z < 8; ++z) plane_rows(bits, nearby + 9, z, to + (1 + z) * kPlaneRows);
}
