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

#include "conv_body.h"

// The float operations of the epilogue on N vectors of channels at once: bytes are packed from all of
// them together, which takes half of the instructions that one vector by itself takes.
template <int N>
struct Floats {
  static constexpr int64_t kLanes = 8 * N;
  struct V {
    __m256 of[N];
  };
  template <class F>
  static inline __attribute__((always_inline)) V each(const F& f) {
    V v;
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) v.of[i] = f(i);
    return v;
  }
  static V load(const float* p) {
    return each([=](int i) { return _mm256_loadu_ps(p + i * 8); });
  }
  static V set(float x) {
    return each([=](int) { return _mm256_set1_ps(x); });
  }
  static V add(const V& a, const V& b) {
    return each([&](int i) { return _mm256_add_ps(a.of[i], b.of[i]); });
  }
  static V mul(const V& a, const V& b) {
    return each([&](int i) { return _mm256_mul_ps(a.of[i], b.of[i]); });
  }
  static V relu(const V& a) {  // a NaN stays
    return each([&](int i) { return _mm256_max_ps(_mm256_setzero_ps(), a.of[i]); });
  }
  // The loads and stores are of `count` channels: of all 8 * N, or, where N is 1, of fewer.
  static V load_int8(const int8_t* p, int64_t count) {
    int8_t bytes[8] = {};
    if (count < 8) p = static_cast<int8_t*>(__builtin_memcpy(bytes, p, count));
    return each([=](int i) {
      const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + i * 8));
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low));
    });
  }
  // Packing saturates what is too low, and what is too high only up to 2^31.
  static __m256i rounded(__m256 t) {
    return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(127.0f), t));
  }
  static void store_int8(int8_t* p, const V& t, int64_t count) {
    if constexpr (N == 1) {
      const __m256i ints = rounded(t.of[0]);
      const __m128i shorts =
          _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
      const __m128i packed = _mm_packs_epi16(shorts, shorts);
      if (count == 8) return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), packed);
      int8_t bytes[8];
      _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes), packed);
      __builtin_memcpy(p, bytes, count);
    } else {  // within each half: 4 bytes of each vector
      const __m256i low = _mm256_packs_epi32(rounded(t.of[0]), rounded(t.of[1]));
      const __m256i high = _mm256_packs_epi32(rounded(t.of[N - 2]), rounded(t.of[N - 1]));
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
      if constexpr (N == 4) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(bytes));
    }
  }
  static void store_half(uint16_t* p, const V& t, int64_t count) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i, p += 8) {
      const __m128i half = _mm256_cvtps_ph(t.of[i], _MM_FROUND_TO_NEAREST_INT);
      if (N > 1 || count == 8) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
        continue;
      }
      uint16_t few[8];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(few), half);
      __builtin_memcpy(p, few, count * sizeof(uint16_t));
    }
  }
  static void store(float* p, const V& t, int64_t count) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i, p += 8) {
      if (N > 1 || count == 8) {
        _mm256_storeu_ps(p, t.of[i]);
        continue;
      }
      float few[8];
      _mm256_storeu_ps(few, t.of[i]);
      __builtin_memcpy(p, few, count * sizeof(float));
    }
  }
};

// The epilogue of up to 32 channels; sum(row, vector) are their exact sums as floats.
template <class Sum>
inline void finish_32(const ConvArgs& a, const Sum& sum, int64_t rows, int64_t channel, int64_t at,
                      int64_t count) {
  const auto vectors = [&](auto number, int64_t v) {
    using F = Floats<decltype(number)::value>;
    const auto sums = [&](int64_t r) {
      return F::each([&](int i) { return sum(r, v + i); });
    };
    finish_int8<F>(a, sums, rows, channel + v * 8, at + v * 8, min64(F::kLanes, count - v * 8));
  };
  if (count == 32) return vectors(std::integral_constant<int, 4>{}, 0);
  int64_t v = 0;
  for (; (v + 2) * 8 <= count; v += 2) vectors(std::integral_constant<int, 2>{}, v);
  for (; v * 8 < count; ++v) vectors(std::integral_constant<int, 1>{}, v);
}

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
