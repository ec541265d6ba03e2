// The AVX-512 and AVX-VNNI intrinsics in portable code, for tests on processors without them.
//
// SIMDe (https://github.com/simd-everywhere/simde, after 0.8.2) has nearly all that this library
// uses; the rest is here. Files that include this are compiled without any -mavx option.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#define _mm256_dpbusd_avx_epi32(sum, a, b) simde_mm256_dpbusd_epi32(sum, a, b)

inline unsigned _tzcnt_u32(unsigned x) { return x == 0 ? 32 : __builtin_ctz(x); }
inline unsigned _blsr_u32(unsigned x) { return x & (x - 1); }

inline __mmask16 _mm512_cmplt_epu32_mask(__m512i a, __m512i b) {
  return static_cast<__mmask16>(~simde_mm512_cmple_epu32_mask(b, a));
}

inline __m256i _mm512_cvtps_ph(__m512 a, int) {  // to nearest, the one mode in use
  const simde__m512_private halves = simde__m512_to_private(a);
  return simde_mm256_set_m128i(simde_mm256_cvtps_ph(halves.m256[1], 0),
                               simde_mm256_cvtps_ph(halves.m256[0], 0));
}

inline __m512i _mm512_cvtepu8_epi16(__m256i a) {
  const __m256i low = simde_mm256_cvtepu8_epi16(simde_mm256_castsi256_si128(a));
  const __m256i high = simde_mm256_cvtepu8_epi16(simde_mm256_extracti128_si256(a, 1));
  return simde_mm512_inserti64x4(simde_mm512_castsi256_si512(low), high, 1);
}
