// What the two 256-bit paths share. Included inside their anonymous namespaces.

// For each mask of eight lanes, the lanes it has, lowest first, one byte each.
struct LaneLists {
  uint64_t of[256];
};
constexpr LaneLists make_lane_lists() {
  LaneLists lists{};
  for (int mask = 0; mask < 256; ++mask) {
    for (int lane = 7; lane >= 0; --lane) {
      if ((mask >> lane & 1) != 0) lists.of[mask] = lists.of[mask] << 8 | static_cast<uint64_t>(lane);
    }
  }
  return lists;
}
constexpr LaneLists kLanesOf = make_lane_lists();

// Eight entries of a table's row; -1 past the end of it.
inline __m256i load_entries(const int32_t* table, int64_t left) {
  if (left >= 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table));
  alignas(32) int32_t last[8] = {-1, -1, -1, -1, -1, -1, -1, -1};
  __builtin_memcpy(last, table, left * sizeof(int32_t));
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(last));
}

inline unsigned present_lanes(__m256i entry) {
  return ~_mm256_movemask_ps(_mm256_castsi256_ps(entry)) & 0xff;
}

inline __m128i lanes_of(unsigned mask) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kLanesOf.of[mask]));
}

// The lanes of the mask first.
inline __m256i compress(__m256i entry, unsigned mask) {
  return _mm256_permutevar8x32_epi32(entry, _mm256_cvtepu8_epi32(lanes_of(mask)));
}

inline bool all_below(__m256i entries, int64_t inputs) {
  const int64_t most = INT32_MAX;
  const __m256i last = _mm256_set1_epi32(static_cast<int32_t>(min64(inputs - 1, most)));
  return _mm256_movemask_epi8(_mm256_cmpgt_epi32(entries, last)) == 0;
}

// Appends the present entries of one tap to the list; returns how many. Whole vectors are stored.
// Not inlined: within the block loop its variables end up in memory, 16 ns a row in place of 9.
__attribute__((noinline)) int64_t compact(const int32_t* table, int64_t rows, int64_t inputs,
                                          int32_t* index, uint8_t* row, bool* in_range) {
  __m256i largest = _mm256_set1_epi32(-1);
  __m128i first = _mm_setzero_si128();
  int64_t count = 0;
  const auto append = [&](__m256i entry) {
    largest = _mm256_max_epi32(largest, entry);
    const unsigned present = present_lanes(entry);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(index + count), compress(entry, present));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(row + count),
                     _mm_add_epi8(lanes_of(present), first));
    count += __builtin_popcount(present);
    first = _mm_add_epi8(first, _mm_set1_epi8(8));
  };
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) {
    _mm_prefetch(reinterpret_cast<const char*>(table + r) + kBlockRows * 4, _MM_HINT_T0);
    append(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table + r)));
  }
  if (r < rows) append(load_entries(table + r, rows - r));
  if (!all_below(largest, inputs)) *in_range = false;
  return count;
}

bool is_nonnegative(const int8_t* features, int64_t count) {
  __m256i all = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(features + i));
    all = _mm256_or_si256(all, some);
  }
  int8_t rest = 0;
  for (; i < count; ++i) rest |= features[i];
  return _mm256_movemask_epi8(all) == 0 && rest >= 0;
}

#include "conv_body.h"

// The float operations of the epilogue on eight channels, or on the first `count` of them.
struct Floats8 {
  static constexpr int64_t kLanes = 8;
  using V = __m256;
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V set(float x) { return _mm256_set1_ps(x); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V relu(V a) { return _mm256_max_ps(_mm256_setzero_ps(), a); }  // a NaN stays
  static V load_int8(const int8_t* p, int64_t count) {
    int8_t bytes[8] = {};
    if (count < 8) p = static_cast<int8_t*>(__builtin_memcpy(bytes, p, count));
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low));
  }
  // Packing saturates what is too low, and what is too high only up to 2^31.
  static __m256i rounded(V t) {
    return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(127.0f), t));
  }
  static void store_int8(int8_t* p, V t, int64_t count) {
    const __m256i ints = rounded(t);
    const __m128i shorts =
        _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
    const __m128i packed = _mm_packs_epi16(shorts, shorts);
    if (count == 8) return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), packed);
    int8_t bytes[8];
    _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes), packed);
    __builtin_memcpy(p, bytes, count);
  }
  template <int N>  // 2 or 4
  static void pack(int8_t* p, const V* t) {  // within each half: 4 bytes of each vector
    const __m256i low = _mm256_packs_epi32(rounded(t[0]), rounded(t[1]));
    const __m256i high = _mm256_packs_epi32(rounded(t[N - 2]), rounded(t[N - 1]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    if constexpr (N == 4) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(bytes));
  }
  static void store_half(uint16_t* p, V t, int64_t count) {
    const __m128i half = _mm256_cvtps_ph(t, _MM_FROUND_TO_NEAREST_INT);
    if (count == 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
    uint16_t few[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(few), half);
    __builtin_memcpy(p, few, count * sizeof(uint16_t));
  }
  static void store(float* p, V t, int64_t count) {
    if (count == 8) return _mm256_storeu_ps(p, t);
    float few[8];
    _mm256_storeu_ps(few, t);
    __builtin_memcpy(p, few, count * sizeof(float));
  }
};

#include "conv_floats.h"

struct Int8Base {
  using Elem = int8_t;
  using Acc = int32_t;
  using V = __m256i;
  using W = __m256i;
  static constexpr int64_t kLanes = 8, kFinishLanes = 32;
  static constexpr int kTileVectors = 2, kFewWeights = 0;
  static V load(const Acc* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(Acc* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static __m256i broadcast4(const void* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  static V zero() { return _mm256_setzero_si256(); }
};
