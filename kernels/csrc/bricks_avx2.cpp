// Bricks with AVX2: the instructions of counting bits and of variable shifts, and hits are listed
// without a branch.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "bricks.h"

namespace fquant {
namespace {

inline int32_t count_bits(uint64_t x) { return static_cast<int32_t>(__builtin_popcountll(x)); }

#include "bricks_portable.h"

inline void fill_rows(const uint64_t* bits, const uint32_t* nearby, uint16_t* to) {
  all_rows(bits, nearby, to);
}

// The set bits of every byte, in order.
struct Bits {
  uint8_t of[256][8];
  constexpr Bits() : of() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0, n = 0; bit < 8; ++bit) {
        if ((byte >> bit & 1) != 0) of[byte][n++] = static_cast<uint8_t>(bit);
      }
    }
  }
};
constexpr Bits kBits;

// Appends a hit per bit of the mask: the voxel's, with an offset and the cell it leads to.
class Appender {
 public:
  explicit Appender(const BrickMap& m) {
    int32_t add[16] = {};
    for (int h = 0; h < kHalf; ++h) add[h] = m.step[h] * 16 + h;
    low_ = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(add));
    high_ = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(add + 8));
  }
  int64_t operator()(uint32_t mask, uint32_t voxel, uint32_t* to) const {
    const int64_t before = count_bits(mask & 255);
    store(low_, mask & 255, voxel, to);
    store(high_, mask >> 8, voxel, to + before);
    return before + count_bits(mask >> 8);
  }

 private:
  static void store(__m256i add, uint32_t byte, uint32_t voxel, uint32_t* to) {
    const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kBits.of[byte]));
    const __m256i all = _mm256_permutevar8x32_epi32(add, _mm256_cvtepu8_epi32(bits));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_add_epi32(all, _mm256_set1_epi32(static_cast<int32_t>(voxel))));
  }

  __m256i low_, high_;
};

#include "bricks_body.h"

}  // namespace

const BrickPath kBricksAvx2{mark, rank, number, order, write, write_inputs};

}  // namespace fquant
