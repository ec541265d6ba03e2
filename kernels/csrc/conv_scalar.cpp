// Portable path: plain C++, for any processor.
#include <cmath>
#include <type_traits>

#include "conv.h"

namespace fquant {
namespace {

inline int64_t compact(const int32_t* table, int64_t rows, int64_t inputs, int32_t* index,
                       uint8_t* row, bool* in_range) {
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (table[r] < 0) continue;
    if (table[r] >= inputs) {
      *in_range = false;
      continue;
    }
    index[count] = table[r];
    row[count++] = static_cast<uint8_t>(r);
  }
  return count;
}

#include "conv_body.h"

// Round half to even, overflow to infinity, a quiet NaN.
inline uint16_t half_of_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above
  if (bits < 0x38800000u) {                        // below 2^-14: a multiple of 2^-24
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    return sign | static_cast<uint16_t>(std::nearbyintf(magnitude * 16777216.0f));
  }
  bits += 0x0fffu + ((bits >> 13) & 1u);
  return sign | static_cast<uint16_t>((bits - 0x38000000u) >> 13);
}

struct Float {
  using V = float;
  static V load(const float* p) { return *p; }
  static V set(float x) { return x; }
  static V add(V a, V b) { return a + b; }
  static V mul(V a, V b) { return a * b; }
  static V relu(V a) { return a < 0.0f ? 0.0f : a; }
  static V load_int8(const int8_t* p, int64_t) { return *p; }
  static void store_int8(int8_t* p, V t, int64_t) {
    t = t < 127.0f ? t : 127.0f;
    t = t > -128.0f ? t : -128.0f;
    *p = static_cast<int8_t>(std::nearbyintf(t));
  }
  static void store_half(uint16_t* p, V t, int64_t) { *p = half_of_float(t); }
  static void store(float* p, V t, int64_t) { *p = t; }
};

template <class A>
struct Lanes {
  A lane[8];
};

template <class E, class S, class W_, class A>
struct Base {
  using Elem = E;
  using Staged = S;
  using Weight = W_;
  using Acc = A;
  using V = Lanes<A>;
  using W = const Weight*;
  static constexpr int64_t kLanes = 8, kGroup = 1, kFinishLanes = 8;
  static constexpr int kTileVectors = 1, kFewWeights = 0;
  static constexpr bool kUnsigned = false, kSegments = false, kStage = false;
  static constexpr int rows(int) { return 2; }
  static V load(const Acc* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static V zero() { return V{}; }
  static void store(Acc* p, const V& v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static W load_weight(const Weight* p) { return p; }
  static Acc broadcast(const Staged* p) { return *p; }
  static V dot(V acc, W w, Acc x) {
    for (int i = 0; i < kLanes; ++i) acc.lane[i] += x * w[i];
    return acc;
  }
  static void stage_row(Staged*, const Elem*, int64_t, int64_t) {}
};

struct Int8Traits : Base<int8_t, int8_t, int16_t, int32_t> {
  static void finish(const ConvArgs& a, const Acc* acc, int64_t pitch, const uint32_t*,
                     int64_t rows, int64_t channel, int64_t at, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const auto sum = [=](int64_t r) { return static_cast<float>(acc[r * pitch + i]); };
      finish_int8<Float>(a, sum, rows, channel + i, at + i, 1);
    }
  }
};

struct FloatTraits : Base<float, float, float, float> {
  static void finish(const ConvArgs& a, const Acc* acc, int64_t pitch, const uint32_t*,
                     int64_t rows, int64_t channel, int64_t at, int64_t count) {
    for (int64_t r = 0; r < rows; ++r, acc += pitch, at += a.out_channels) {
      for (int64_t i = 0; i < count; ++i) {
        const float bias = a.bias == nullptr ? 0.0f : a.bias[channel + i];
        static_cast<float*>(a.out)[at + i] = acc[i] + bias;
      }
    }
  }
};

}  // namespace

extern const ConvPath conv_int8_scalar = make_path<Int8Traits>(nullptr);
extern const ConvPath conv_float_scalar = make_path<FloatTraits>(nullptr);

}  // namespace fquant
