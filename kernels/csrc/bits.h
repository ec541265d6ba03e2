// Bit counting and unaligned reads.
#pragma once

#include <cstdint>
#include <cstring>

namespace fquant {

#ifdef FQUANT_X86
inline const bool has_popcnt = (__builtin_cpu_init(), __builtin_cpu_supports("popcnt") != 0);
#endif

// Set bits of a word. The popcnt instruction is not in the x86-64 baseline, and the compiler's own
// replacement is a call. With it kernel maps take 2 to 14 % less time than by twelve operations
// (Zen 3).
inline int32_t count_bits(uint64_t x) {
#ifdef FQUANT_X86
  if (has_popcnt) {
    uint64_t count;
    __asm__("popcnt %1, %0" : "=r"(count) : "r"(x) : "cc");
    return static_cast<int32_t>(count);
  }
#endif
  x -= x >> 1 & 0x5555555555555555;
  x = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f;
  return static_cast<int32_t>((x * 0x0101010101010101) >> 56);
}

// Bits [index, index + 57) of a little-endian bitmap, and some above; reads up to 8 bytes past it.
inline uint64_t bits_from(const uint64_t* bitmap, uint64_t index) {
  uint64_t word;
  std::memcpy(&word, reinterpret_cast<const char*>(bitmap) + (index >> 3), sizeof(word));
  return word >> (index & 7);
}

}  // namespace fquant
