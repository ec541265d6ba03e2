// Kernel maps brick by brick with AVX-512: rows of a brick are made four planes at a time, and hits
// are listed without a branch.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // in the header itself, as GCC 12 has it
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

#include "kernel_map_bricks.h"

namespace fquant {
namespace {

inline int32_t count(uint64_t x) { return static_cast<int32_t>(__builtin_popcountll(x)); }
inline uint64_t bits_from(const uint64_t* bitmap, uint64_t index) {
  uint64_t word;
  std::memcpy(&word, reinterpret_cast<const char*>(bitmap) + (index >> 3), sizeof(word));
  return word >> (index & 7);
}

#include "kernel_map_bricks_body.h"

constexpr int kPlaneRows = 16;  // rows of ten cells: -1 to 8, and room

// Rows of planes as words of ten bits, from the bytes of three bricks.
inline __m512i join(__m512i left, __m512i middle, __m512i right) {
  const __m512i last = _mm512_slli_epi16(_mm512_and_si512(right, _mm512_set1_epi16(1)), 9);
  return _mm512_or_si512(_mm512_or_si512(_mm512_slli_epi16(middle, 1), last),
                         _mm512_srli_epi16(left, 7));
}

inline __m512i load(const uint64_t* p) { return _mm512_loadu_si512(p); }
inline __m512i low_words(__m512i x) {
  return _mm512_cvtepu8_epi16(_mm512_castsi512_si256(x));
}
inline __m512i high_words(__m512i x) {
  return _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(x, 1));
}

// Planes 0 to 7 of the brick, of whose nearby ones of its own planes `n` are the first.
inline void fill_rows(const uint64_t* bits, const uint32_t* n, uint16_t* to) {
  const auto of = [&](int i) { return load(bits + n[i]); };
  const __m512i left = of(3), middle = of(4), right = of(5);
  const __m512i half[2] = {join(low_words(left), low_words(middle), low_words(right)),
                           join(high_words(left), high_words(middle), high_words(right))};
  const auto last = [&](int i) { return _mm512_srli_epi64(of(i), 56); };
  const auto first = [&](int i) {
    return _mm512_and_si512(of(i), _mm512_set1_epi64(255));
  };
  const __m512i above = join(last(0), last(1), last(2));    // one word of every eight bytes
  const __m512i below = join(first(6), first(7), first(8));
  const __m512i ends = _mm512_or_si512(above, _mm512_slli_epi64(below, 16));  // of eight planes
  // Lane 32 + 4 p of the two sources is the row above plane p, 33 + 4 p the one below.
  for (int p = 0; p < 8; p += 2) {
    const int from = p % 4 * 8;
    alignas(64) int16_t lane[32];
    for (int i = 0; i < 32; ++i) {
      const int plane = p + i / 16, row = i % 16;
      lane[i] = static_cast<int16_t>(row == 0   ? 32 + 4 * plane
                                     : row < 9  ? from + i / 16 * 8 + row - 1
                                     : row == 9 ? 33 + 4 * plane
                                                : 0);
    }
    const __m512i rows =
        _mm512_permutex2var_epi16(half[p / 4], _mm512_load_si512(lane), ends);
    _mm512_storeu_si512(to + p * kPlaneRows, rows);
  }
}

// Plane 7 of the bricks before.
inline void fill_first(const uint64_t* bits, const uint32_t* n, uint16_t* to) {
  const auto bytes = [&](int i) { return reinterpret_cast<const uint8_t*>(&bits[n[i] + 7]); };
  const auto row = [](unsigned left, unsigned middle, unsigned right) {
    return static_cast<uint16_t>(left >> 7 | middle << 1 | (right & 1) << 9);
  };
  const auto words = [&](int i) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes(i)));
    return _mm512_castsi128_si512(_mm_cvtepu8_epi16(eight));
  };
  const __m512i rows = join(words(3), words(4), words(5));
  to[0] = row(bytes(0)[7], bytes(1)[7], bytes(2)[7]);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 1), _mm512_castsi512_si128(rows));
  to[9] = row(bytes(6)[0], bytes(7)[0], bytes(8)[0]);
}

}  // namespace

void write_bricks_avx512(const BrickMap& m, int64_t first, int64_t last) {
  uint32_t nearby[kNearby];
  uint16_t rows[9 * kPlaneRows + 8] = {};
  uint32_t hits[512 * kHalf + 16];
  alignas(64) int32_t add[16] = {};
  for (int h = 0; h < kHalf; ++h) add[h] = m.step[h] * 16 + h;
  const __m512i offsets = _mm512_load_si512(add);
  for (int64_t b = first; b < last; ++b) {
    find_nearby(m, b, nearby);
    fill_first(m.bits, nearby, rows);
    fill_rows(m.bits, nearby + 9, rows + kPlaneRows);
    const BrickSlot* voxels = m.slots + m.start[b * 8];
    const int64_t end = m.start[b * 8 + 8] - m.start[b * 8];
    int64_t num_hits = 0;
    for (int64_t v = 0; v < end; ++v) {
      const BrickSlot& slot = voxels[v];
      const uint16_t* line = rows + slot.line;
      const uint32_t mask =
          (nine_bits(line, slot.bit) | nine_bits(line + kPlaneRows, slot.bit) << 9) & m.wanted;
      const __m512i all = _mm512_add_epi32(
          _mm512_set1_epi32(static_cast<int32_t>(v << 14 | slot.cell << 4)), offsets);
      _mm512_storeu_si512(hits + num_hits,
                          _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), all));
      num_hits += count(mask);
    }
    write_hits(m, nearby, voxels, hits, num_hits);
  }
}

}  // namespace fquant
