// What the two 256-bit paths share. Included inside their anonymous namespaces.

inline int64_t compact(const int32_t* table, int64_t rows, int64_t inputs, int32_t* index,
                       uint8_t* row, bool* in_range) {
  int64_t count = 0;
  for (int64_t r = 0; r < rows; r += 8) {
    const int64_t left = rows - r;
    __m256i entry;
    if (left >= 8) {
      entry = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table + r));
    } else {
      alignas(32) int32_t last[8] = {-1, -1, -1, -1, -1, -1, -1, -1};
      __builtin_memcpy(last, table + r, left * sizeof(int32_t));
      entry = _mm256_load_si256(reinterpret_cast<const __m256i*>(last));
    }
    unsigned present = ~_mm256_movemask_ps(_mm256_castsi256_ps(entry)) & 0xff;
    for (; present != 0; present &= present - 1) {
      const int64_t at = r + __builtin_ctz(present);
      if (table[at] >= inputs) {
        *in_range = false;
        continue;
      }
      index[count] = table[at];
      row[count++] = static_cast<uint8_t>(at);
    }
  }
  return count;
}

#include "conv_body.h"

struct Float {
  using V = __m256;
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V set(float x) { return _mm256_set1_ps(x); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V relu(V a) { return _mm256_max_ps(_mm256_setzero_ps(), a); }  // a NaN stays
  static V load_int8(const int8_t* p, int64_t count) {
    int8_t bytes[8] = {};
    __builtin_memcpy(bytes, p, count);
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low));
  }
  static void store_int8(int8_t* p, V t, int64_t count) {
    t = _mm256_min_ps(_mm256_max_ps(t, _mm256_set1_ps(-128.0f)), _mm256_set1_ps(127.0f));
    const __m256i ints = _mm256_cvtps_epi32(t);
    const __m128i shorts =
        _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
    int8_t bytes[8];
    _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes), _mm_packs_epi16(shorts, shorts));
    __builtin_memcpy(p, bytes, count);
  }
  static void store_half(uint16_t* p, V t, int64_t count) {
    uint16_t half[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(half),
                     _mm256_cvtps_ph(t, _MM_FROUND_TO_NEAREST_INT));
    __builtin_memcpy(p, half, count * sizeof(uint16_t));
  }
  static void store(float* p, V t, int64_t count) {
    if (count == 8) return _mm256_storeu_ps(p, t);
    float values[8];
    _mm256_storeu_ps(values, t);
    __builtin_memcpy(p, values, count * sizeof(float));
  }
};

struct Int8Base {
  using Elem = int8_t;
  using Acc = int32_t;
  using V = __m256i;
  using W = __m256i;
  static constexpr int64_t kLanes = 8;
  static constexpr int kTileVectors = 2;
  static V load(const Acc* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(Acc* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static __m256i broadcast4(const void* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  static V zero() { return _mm256_setzero_si256(); }
};
