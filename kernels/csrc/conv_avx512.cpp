// AVX-512 path: vpdpbusd, of unsigned by signed bytes, exact in wrapping int32. Inputs that are not
// negative are the unsigned side; others are the signed one, and weights are then w + 128.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // in the header itself, as GCC 12 has it
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <type_traits>

#include "conv.h"

namespace fquant {
namespace {

// Appends the present entries of one tap to the list; returns how many.
inline int64_t compact(const int32_t* table, int64_t rows, int64_t inputs, int32_t* index,
                       uint8_t* row, bool* in_range) {
  const int64_t most = INT32_MAX;
  const __m512i limit = _mm512_set1_epi32(static_cast<int32_t>(min64(inputs, most)));
  const __m512i none = _mm512_set1_epi32(-1);
  // One comparison at the end: one per vector, its masks collected, took four times as long (Zen 5).
  __m512i largest = none;
  __m512i ids = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i step = _mm512_set1_epi32(16);
  int64_t count = 0;
  for (int64_t r = 0; r < rows; r += 16) {
    const int64_t left = rows - r;
    const __mmask16 live = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    _mm_prefetch(reinterpret_cast<const char*>(table + r) + kBlockRows * 8, _MM_HINT_T0);
    const __m512i entry = _mm512_mask_loadu_epi32(none, live, table + r);
    const __mmask16 present = _mm512_cmpgt_epi32_mask(entry, none);
    largest = _mm512_max_epi32(largest, entry);
    // In a register, then stored: compressing to memory is microcoded on some processors.
    _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(present, entry));
    const __m512i kept = _mm512_maskz_compress_epi32(present, ids);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + count), _mm512_cvtepi32_epi8(kept));
    count += __builtin_popcount(present);
    ids = _mm512_add_epi32(ids, step);
  }
  if (_mm512_cmpge_epi32_mask(largest, limit) != 0) *in_range = false;
  return count;
}

#include "conv_body.h"

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

// The float operations of the epilogue on sixteen channels, or on the first `count` of them.
struct Floats16 {
  static constexpr int64_t kLanes = 16;
  using V = __m512;
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V set(float x) { return _mm512_set1_ps(x); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V relu(V a) { return _mm512_max_ps(_mm512_setzero_ps(), a); }  // a NaN stays
  static V load_int8(const int8_t* p, int64_t count) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(count), p)));
  }
  // Narrowing saturates what is too low, and what is too high only up to 2^31.
  static __m512i rounded(V t) {
    return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_set1_ps(127.0f), t));
  }
  static void store_int8(int8_t* p, V t, int64_t count) {
    const __m128i bytes = _mm512_cvtsepi32_epi8(rounded(t));
    if (count == 16) {  // narrowing and storing under a mask in one is microcoded
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    } else {
      _mm_mask_storeu_epi8(p, first_lanes(count), bytes);
    }
  }
  template <int N>  // 2 or 4
  static void pack(int8_t* p, const V* t) {  // within each quarter: 4 bytes of each vector
    const __m512i low = _mm512_packs_epi32(rounded(t[0]), rounded(t[1]));
    const __m512i high = _mm512_packs_epi32(rounded(t[N - 2]), rounded(t[N - 1]));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
    if constexpr (N == 4) return _mm512_storeu_si512(p, bytes);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(bytes));
  }
  static void store_half(uint16_t* p, V t, int64_t count) {
    const __m256i half = _mm512_cvtps_ph(t, _MM_FROUND_TO_NEAREST_INT);
    _mm256_mask_storeu_epi16(p, first_lanes(count), half);
  }
  static void store(float* p, V t, int64_t count) {
    _mm512_mask_storeu_ps(p, first_lanes(count), t);
  }
};

#include "conv_floats.h"

struct Int8Traits {
  using Elem = int8_t;
  using Staged = int8_t;
  using Weight = int8_t;
  using Acc = int32_t;
  using V = __m512i;
  using W = __m512i;
  static constexpr int64_t kLanes = 16, kGroup = 4, kFinishLanes = 64;
  static constexpr int kTileVectors = 4, kFewWeights = 16;
  static constexpr bool kUnsigned = true, kSegments = false, kStage = false;
  static constexpr int rows(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 4; }
  static V load(const Acc* p) { return _mm512_loadu_si512(p); }
  static void store(Acc* p, V v) { _mm512_storeu_si512(p, v); }
  static W load_weight(const Weight* p) {  // w + 128
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
  }
  static __m512i broadcast(const Staged* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  static V dot(V acc, W w, __m512i x) { return _mm512_dpbusd_epi32(acc, w, x); }
  static void stage_row(Staged* to, const Elem* from, int64_t channels, int64_t width) {
    __builtin_memcpy(to, from, channels);
    for (int64_t c = channels; c < width; ++c) to[c] = 0;
  }
  static V zero() { return _mm512_setzero_si512(); }
  static void finish(const ConvArgs& a, const Acc* acc, int64_t pitch, const uint32_t* minus,
                     int64_t rows, int64_t channel, int64_t at, int64_t count) {
    const auto sum = [=](int64_t r, int64_t v) {
      const V less = _mm512_set1_epi32(static_cast<int32_t>(minus[r]));
      return _mm512_cvtepi32_ps(_mm512_sub_epi32(load(acc + r * pitch + v * kLanes), less));
    };
    finish_vectors<Floats16>(a, sum, rows, channel, at, count);
  }
};

// For inputs that are not negative: these are the unsigned side, and the weights the signed one, so
// there is nothing to take off.
struct NonnegativeTraits : Int8Traits {
  static constexpr bool kUnsigned = false;
  static W load_weight(const Weight* p) { return _mm512_loadu_si512(p); }
  static V dot(V acc, W w, __m512i x) { return _mm512_dpbusd_epi32(acc, x, w); }
  static void finish(const ConvArgs& a, const Acc* acc, int64_t pitch, const uint32_t*,
                     int64_t rows, int64_t channel, int64_t at, int64_t count) {
    const auto sum = [=](int64_t r, int64_t v) {
      return _mm512_cvtepi32_ps(load(acc + r * pitch + v * kLanes));
    };
    finish_vectors<Floats16>(a, sum, rows, channel, at, count);
  }
};

bool is_nonnegative(const int8_t* features, int64_t count) {
  __m512i all = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 64) {
    const __mmask64 live = count - i >= 64 ? ~0ull : (1ull << (count - i)) - 1;
    all = _mm512_or_si512(all, _mm512_maskz_loadu_epi8(live, features + i));
  }
  return _mm512_movepi8_mask(all) == 0;
}

void row_sums(const ConvArgs& a, int64_t first, int64_t last) {
  const int8_t* features = static_cast<const int8_t*>(a.features);
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = first; i < last; ++i) {
    const int8_t* x = features + i * a.channels;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t c = 0; c < a.channels; c += 64) {
      const int64_t left = a.channels - c;
      const __mmask64 live = left >= 64 ? ~0ull : (1ull << left) - 1;
      sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(live, x + c));
    }
    a.row_sums[i] = _mm512_reduce_add_epi32(sum);
  }
}

struct FloatTraits {
  using Elem = float;
  using Staged = float;
  using Weight = float;
  using Acc = float;
  using V = __m512;
  using W = __m512;
  static constexpr int64_t kLanes = 16, kGroup = 1, kFinishLanes = 16;
  static constexpr int kTileVectors = 4, kFewWeights = 0;
  static constexpr bool kUnsigned = false, kSegments = false, kStage = false;
  static constexpr int rows(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 4; }
  static V load(const Acc* p) { return _mm512_loadu_ps(p); }
  static void store(Acc* p, V v) { _mm512_storeu_ps(p, v); }
  static W load_weight(const Weight* p) { return _mm512_loadu_ps(p); }
  static __m512 broadcast(const Staged* p) { return _mm512_set1_ps(*p); }
  static V dot(V acc, W w, __m512 x) { return _mm512_fmadd_ps(w, x, acc); }
  static void stage_row(Staged*, const Elem*, int64_t, int64_t) {}
  static V zero() { return _mm512_setzero_ps(); }
  static void finish(const ConvArgs& a, const Acc* acc, int64_t pitch, const uint32_t*,
                     int64_t rows, int64_t channel, int64_t at, int64_t count) {
    finish_floats<Floats16>(a, acc, pitch, rows, channel, at, count);
  }
};

constexpr ConvPath nonnegative = make_path<NonnegativeTraits>(nullptr);

}  // namespace

extern const ConvPath conv_int8_avx512vnni =
    with_nonnegative(make_path<Int8Traits>(row_sums), nonnegative, always, is_nonnegative);
extern const ConvPath conv_float_avx512 = make_path<FloatTraits>(nullptr);

}  // namespace fquant
