// Rows are read as one stream: element n is of axis n % axes, so minima of as many vectors as there
// are axes take in whole rows, whatever the number of axes. With AVX2 a strided map of 86k voxels and
// its outputs take 3.28 ms in place of 3.50 (Zen 5).
#include "coord_range.h"

#include "isa.h"

namespace fquant {
namespace {

template <class T, int AXES>
inline __attribute__((always_inline)) Range scan(const T* coords, int64_t count) {
  typedef T V __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
  constexpr int kLanes = 32 / sizeof(T);
  T lows[AXES * kLanes], highs[AXES * kLanes];
  for (int n = 0; n < AXES * kLanes; ++n) lows[n] = highs[n] = coords[n % AXES];
  V low[AXES], high[AXES];
#pragma GCC unroll 5
  for (int v = 0; v < AXES; ++v) low[v] = high[v] = reinterpret_cast<const V*>(lows)[v];
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma GCC unroll 5
    for (int v = 0; v < AXES; ++v) {
      const V x = reinterpret_cast<const V*>(coords + i * AXES)[v];
      low[v] = low[v] < x ? low[v] : x;
      high[v] = high[v] > x ? high[v] : x;
    }
  }
#pragma GCC unroll 5
  for (int v = 0; v < AXES; ++v) {
    reinterpret_cast<V*>(lows)[v] = low[v], reinterpret_cast<V*>(highs)[v] = high[v];
  }
  Range range;
  for (int a = 0; a < AXES; ++a) {
    T low = coords[a], high = coords[a];
    for (int n = a; n < AXES * kLanes; n += AXES) {
      low = lows[n] < low ? lows[n] : low, high = highs[n] > high ? highs[n] : high;
    }
    for (int64_t r = i; r < count; ++r) {
      const T x = coords[r * AXES + a];
      low = x < low ? x : low, high = x > high ? x : high;
    }
    range.low[a] = low, range.high[a] = high;
  }
  return range;
}

template <class T>
inline __attribute__((always_inline)) Range scan(const T* coords, int64_t count, int axes) {
  return axes == 2   ? scan<T, 2>(coords, count)
         : axes == 3 ? scan<T, 3>(coords, count)
         : axes == 4 ? scan<T, 4>(coords, count)
                     : scan<T, kAxes>(coords, count);
}

#ifdef FQUANT_X86
template <class T>
__attribute__((target("avx2"))) Range scan_avx2(const T* coords, int64_t count, int axes) {
  return scan(coords, count, axes);
}
#endif

}  // namespace

template <class T>
Range range_of(const T* coords, int64_t count, int axes) {
#ifdef FQUANT_X86
  if (isa_available(kAvx2)) return scan_avx2(coords, count, axes);
#endif
  return scan(coords, count, axes);
}

template Range range_of(const int32_t*, int64_t, int);
template Range range_of(const int64_t*, int64_t, int);

}  // namespace fquant
