// AVX-VNNI path: the 256-bit vpdpbusd of client processors without AVX-512. Signs are handled as in
// conv_avx512.cpp.
#include <immintrin.h>

#include <type_traits>

#include "conv.h"

namespace fquant {
namespace {

#include "conv_avx2.h"

struct Int8Traits : Int8Base {
  using Staged = int8_t;
  using Weight = int8_t;
  static constexpr int64_t kGroup = 4;
  static constexpr bool kUnsigned = true, kSegments = false, kStage = false;
  static constexpr int rows(int vectors) { return vectors == 2 ? 6 : 8; }
  static W load_weight(const Weight* p) {  // w + 128
    return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                            _mm256_set1_epi8(-128));
  }
  static __m256i broadcast(const Staged* p) { return broadcast4(p); }
  static V dot(V acc, W w, __m256i x) { return _mm256_dpbusd_avx_epi32(acc, w, x); }
  static void stage_row(Staged* to, const Elem* from, int64_t channels, int64_t width) {
    __builtin_memcpy(to, from, channels);
    for (int64_t c = channels; c < width; ++c) to[c] = 0;
  }
  static void finish(const ConvArgs& a, const Acc* acc, int64_t pitch, const uint32_t* minus,
                     int64_t rows, int64_t channel, int64_t at, int64_t count) {
    const auto sum = [=](int64_t r, int64_t v) {
      const V less = _mm256_set1_epi32(static_cast<int32_t>(minus[r]));
      return _mm256_cvtepi32_ps(_mm256_sub_epi32(load(acc + r * pitch + v * kLanes), less));
    };
    finish_vectors<Floats8>(a, sum, rows, channel, at, count);
  }
};

struct NonnegativeTraits : Int8Traits {
  static constexpr bool kUnsigned = false;
  static W load_weight(const Weight* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static V dot(V acc, W w, __m256i x) { return _mm256_dpbusd_avx_epi32(acc, x, w); }
  static void finish(const ConvArgs& a, const Acc* acc, int64_t pitch, const uint32_t*,
                     int64_t rows, int64_t channel, int64_t at, int64_t count) {
    const auto sum = [=](int64_t r, int64_t v) {
      return _mm256_cvtepi32_ps(load(acc + r * pitch + v * kLanes));
    };
    finish_vectors<Floats8>(a, sum, rows, channel, at, count);
  }
};

void row_sums(const ConvArgs& a, int64_t first, int64_t last) {
  const int8_t* features = static_cast<const int8_t*>(a.features);
  const __m256i ones = _mm256_set1_epi8(1);
  for (int64_t i = first; i < last; ++i) {
    const int8_t* x = features + i * a.channels;
    __m256i sums = _mm256_setzero_si256();
    int64_t c = 0;
    for (; c + 32 <= a.channels; c += 32) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + c));
      sums = _mm256_dpbusd_avx_epi32(sums, ones, bytes);
    }
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums);
    int32_t sum = 0;
    for (const int32_t lane : lanes) sum += lane;
    for (; c < a.channels; ++c) sum += x[c];
    a.row_sums[i] = sum;
  }
}

constexpr ConvPath nonnegative = make_path<NonnegativeTraits>(nullptr);

}  // namespace

extern const ConvPath conv_int8_avxvnni =
    with_nonnegative(make_path<Int8Traits>(row_sums), nonnegative, always, is_nonnegative);

}  // namespace fquant
