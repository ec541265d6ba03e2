// Bricks with AVX-512: rows of a brick are made four planes at a time, and hits
// are listed without a branch.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // in the header itself, as GCC 12 has it
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

#include "bricks.h"

namespace fquant {
namespace {

inline int32_t count_bits(uint64_t x) { return static_cast<int32_t>(__builtin_popcountll(x)); }

// The four axes of 16 rows, counted from `low`; axes there are not are 0.
template <class T>
inline void columns(const BrickMap& m, const T* coords, int64_t left, __m512i* to) {
  __m512i rows[4];
  alignas(64) int32_t column[16];
  if (sizeof(T) == 4 && m.axes == 4 && left >= 16) {
    for (int j = 0; j < 4; ++j) rows[j] = _mm512_loadu_si512(coords + 16 * j);
    const __m512i first =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
    const __m512i a = _mm512_permutex2var_epi32(rows[0], first, rows[1]);
    const __m512i b = _mm512_permutex2var_epi32(rows[2], first, rows[3]);
    const __m512i c = _mm512_permutex2var_epi32(rows[0], second, rows[1]);
    const __m512i d = _mm512_permutex2var_epi32(rows[2], second, rows[3]);
    to[0] = _mm512_shuffle_i64x2(a, b, 0x44);
    to[1] = _mm512_shuffle_i64x2(a, b, 0xee);
    to[2] = _mm512_shuffle_i64x2(c, d, 0x44);
    to[3] = _mm512_shuffle_i64x2(c, d, 0xee);
    for (int a = 0; a < 4; ++a) {
      to[a] = _mm512_sub_epi32(to[a], _mm512_set1_epi32(static_cast<int32_t>(m.low[a])));
    }
    return;
  }
  for (int a = 0; a < 4; ++a) {
    for (int64_t i = 0; i < 16; ++i) {
      column[i] = a < m.axes && i < left
                      ? static_cast<int32_t>(coords[i * m.axes + a] - m.low[a]) : 0;
    }
    to[a] = _mm512_load_si512(column);
  }
}

template <class T>
void mark_cells(const BrickMap& m, const T* coords) {
  for (int64_t i = 0; i < m.count; i += 16) {
    const int64_t left = m.count - i;
    __m512i x[4];
    columns(m, coords + i * m.axes, left, x);
    __m512i at = _mm512_set1_epi32(static_cast<int32_t>(m.first)), cell = _mm512_setzero_si512();
    for (int a = 0; a < 4; ++a) {
      const auto all = [](uint32_t v) { return _mm512_set1_epi32(static_cast<int32_t>(v)); };
      const __m512i brick = _mm512_srlv_epi32(x[a], all(m.shift[a]));
      at = _mm512_add_epi32(at, _mm512_mullo_epi32(brick, all(m.stride[a])));
      const __m512i inside = _mm512_and_si512(x[a], all(m.mask[a]));
      cell = _mm512_or_si512(cell, _mm512_sllv_epi32(inside, all(m.cell[a])));
    }
    const int64_t some = left < 16 ? left : 16;
    const __mmask16 live = static_cast<__mmask16>((1u << some) - 1);
    _mm512_mask_storeu_epi32(m.code + i, live, at);
    _mm256_mask_storeu_epi16(m.cell_of + i, live, _mm512_cvtepi32_epi16(cell));
    for (int64_t j = i; j < i + some; ++j) {
      m.grid[m.code[j] >> 6] |= uint64_t{1} << (m.code[j] & 63);
    }
  }
}

// Rows of planes as words of ten bits, from the bytes of three bricks.
inline __m512i join(__m512i left, __m512i middle, __m512i right) {
  const __m512i last = _mm512_slli_epi16(_mm512_and_si512(right, _mm512_set1_epi16(1)), 9);
  return _mm512_or_si512(_mm512_or_si512(_mm512_slli_epi16(middle, 1), last),
                         _mm512_srli_epi16(left, 7));
}

inline __m512i low_words(__m512i x) { return _mm512_cvtepu8_epi16(_mm512_castsi512_si256(x)); }
inline __m512i high_words(__m512i x) {
  return _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(x, 1));
}

// Lanes of the rows of planes p and p + 1: of rows of four planes, and, from 32 on, of the rows
// above and below every plane.
struct Lanes {
  alignas(64) int16_t of[4][32];
  constexpr Lanes() : of() {
    for (int i = 0; i < 4 * 32; ++i) {
      const int plane = i / 16, row = i % 16;
      of[i / 32][i % 32] = static_cast<int16_t>(row == 0   ? 32 + 4 * plane
                                                : row < 9  ? plane % 4 * 8 + row - 1
                                                : row == 9 ? 33 + 4 * plane
                                                           : 0);
    }
  }
};
constexpr Lanes kLanes;

// Planes -1 to 7 of a brick.
inline void fill_rows(const uint64_t* bits, const uint32_t* nearby, uint16_t* to) {
  const auto of = [&](int i) { return _mm512_loadu_si512(bits + nearby[9 + i]); };
  const __m512i left = of(3), middle = of(4), right = of(5);
  const __m512i half[2] = {join(low_words(left), low_words(middle), low_words(right)),
                           join(high_words(left), high_words(middle), high_words(right))};
  const auto last = [&](int i) { return _mm512_srli_epi64(of(i), 56); };
  const auto first = [&](int i) { return _mm512_and_si512(of(i), _mm512_set1_epi64(255)); };
  const __m512i above = join(last(0), last(1), last(2));  // one word of every eight bytes
  const __m512i below = join(first(6), first(7), first(8));
  const __m512i ends = _mm512_or_si512(above, _mm512_slli_epi64(below, 16));
  for (int i = 0; i < 4; ++i) {
    const __m512i rows =
        _mm512_permutex2var_epi16(half[i / 2], _mm512_load_si512(kLanes.of[i]), ends);
    _mm512_storeu_si512(to + (1 + 2 * i) * kPlaneRows, rows);
  }
  // Plane 7 of the bricks before.
  const auto bytes = [&](int i) {
    return reinterpret_cast<const uint8_t*>(&bits[nearby[i] + 7]);
  };
  const auto row = [](unsigned left, unsigned middle, unsigned right) {
    return static_cast<uint16_t>(left >> 7 | middle << 1 | (right & 1) << 9);
  };
  const auto words = [&](int i) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes(i)));
    return _mm512_castsi128_si512(_mm_cvtepu8_epi16(eight));
  };
  to[0] = row(bytes(0)[7], bytes(1)[7], bytes(2)[7]);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 1),
                   _mm512_castsi512_si128(join(words(3), words(4), words(5))));
  to[9] = row(bytes(6)[0], bytes(7)[0], bytes(8)[0]);
}

// Appends a hit per bit of the mask: the voxel's, with an offset and the cell it leads to.
class Appender {
 public:
  explicit Appender(const BrickMap& m) {
    alignas(64) int32_t add[16] = {};
    for (int h = 0; h < kHalf; ++h) add[h] = m.step[h] * 16 + h;
    offsets_ = _mm512_load_si512(add);
  }
  int64_t operator()(uint32_t mask, uint32_t voxel, uint32_t* to) const {
    const __m512i all = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(voxel)), offsets_);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), all));
    return count_bits(mask);
  }

 private:
  __m512i offsets_;
};

#include "bricks_body.h"

}  // namespace

const BrickPath kBricksAvx512{mark, rank, number, order, write, write_inputs};

}  // namespace fquant
