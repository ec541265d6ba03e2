// AVX2 path: vpmaddwd of int16 pairs, exact.
//
// Its bound is that pair of instructions, vpmaddwd and vpaddd: Zen 3 has two units for the first and
// four for both, so 32 products a cycle at the very most; alone, in registers, they reach 25.
// For inputs of either sign nothing exact does more. vpmaddubsw has twice the products but saturates
// at int16 unless one side has 7 bits; halves of 4 bits, summed in int16, need two of it; with signs
// moved to the weights its sums need vpmaddwd again: two multiplications for 32 products each time,
// as here. Inputs that are not negative have 7 bits: see conv_nonnegative_avx2.h.
#include <immintrin.h>

#include <type_traits>

#include "conv.h"

namespace fquant {
namespace {

#include "conv_avx2.h"

struct Int8Traits : Int8Base {
  using Staged = int16_t;
  using Weight = int16_t;
  static constexpr int64_t kGroup = 2;
  static constexpr bool kUnsigned = false, kSegments = false, kStage = true;
  static constexpr int rows(int vectors) { return vectors == 2 ? 6 : 8; }
  static W load_weight(const Weight* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static __m256i broadcast(const Staged* p) { return broadcast4(p); }
  static V dot(V acc, W w, __m256i x) { return _mm256_add_epi32(acc, _mm256_madd_epi16(w, x)); }
  static void stage_row(Staged* to, const Elem* from, int64_t channels, int64_t width) {
    int64_t c = 0;
    for (; c + 16 <= channels; c += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + c));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c), _mm256_cvtepi8_epi16(bytes));
    }
    for (; c < channels; ++c) to[c] = from[c];
    for (; c < width; ++c) to[c] = 0;
  }
  static void finish(const ConvArgs& a, const Acc* acc, int64_t pitch, const uint32_t*,
                     int64_t rows, int64_t channel, int64_t at, int64_t count) {
    const auto sum = [=](int64_t r, int64_t v) {
      return _mm256_cvtepi32_ps(load(acc + r * pitch + v * kLanes));
    };
    finish_vectors<Floats8>(a, sum, rows, channel, at, count);
  }
};

#include "conv_nonnegative_avx2.h"
#include "conv_rows_avx2.h"

struct FloatTraits {
  using Elem = float;
  using Staged = float;
  using Weight = float;
  using Acc = float;
  using V = __m256;
  using W = __m256;
  static constexpr int64_t kLanes = 8, kGroup = 1, kFinishLanes = 8;
  static constexpr int kTileVectors = 2, kFewWeights = 0;
  static constexpr bool kUnsigned = false, kSegments = false, kStage = false;
  static constexpr int rows(int vectors) { return vectors == 2 ? 6 : 8; }
  static V load(const Acc* p) { return _mm256_loadu_ps(p); }
  static void store(Acc* p, V v) { _mm256_storeu_ps(p, v); }
  static W load_weight(const Weight* p) { return _mm256_loadu_ps(p); }
  static __m256 broadcast(const Staged* p) { return _mm256_set1_ps(*p); }
  static V dot(V acc, W w, __m256 x) { return _mm256_fmadd_ps(w, x, acc); }
  static void stage_row(Staged*, const Elem*, int64_t, int64_t) {}
  static V zero() { return _mm256_setzero_ps(); }
  static void finish(const ConvArgs& a, const Acc* acc, int64_t pitch, const uint32_t*,
                     int64_t rows, int64_t channel, int64_t at, int64_t count) {
    finish_floats<Floats8>(a, acc, pitch, rows, channel, at, count);
  }
};

const ConvPath nonnegative = {
    {Int8Base::kLanes, NonnegativeTraits::kGroup, NonnegativeTraits::kTileVectors, 1, true},
    scratch_bytes<NonnegativeTraits>,
    nullptr,
    block<NonnegativeTraits>,
    nonnegative_peak,
    list_pairs,
    nullptr,
    nullptr,
    nullptr};

// With fewer channels than a step takes, 8 to 8: 3.8 ms in place of 3.0 (Zen 3); with 12 to 16 the
// same, with 20 to 32 already faster. 16 to 16 row by row, memory cold, is 14 % faster than this.
bool gains(const ConvArgs& a) {
  if (a.channels < NonnegativeTraits::kGroup) return false;
  return !by_rows(a) || a.channels * a.out_channels > 256;
}

constexpr ConvPath int8_path(ConvPath path) {
  path.scratch_bytes = int8_scratch_bytes;
  path.block = int8_block;
  path.peak = nonnegative_peak;
  return with_nonnegative(path, nonnegative, gains, is_nonnegative);
}

}  // namespace

extern const ConvPath conv_int8_avx2 = int8_path(make_path<Int8Traits>(nullptr));
extern const ConvPath conv_float_avx2 = make_path<FloatTraits>(nullptr);

}  // namespace fquant
