#include "isa.h"

#ifdef FQUANT_X86
#include <cpuid.h>
#endif

namespace fquant {

#ifdef FQUANT_X86
namespace {

bool has_avx_vnni() {  // __builtin_cpu_supports knows it from GCC 13 only
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         [] {
           unsigned a, b, c, d;
           return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
         }();
}

}  // namespace

// __builtin_cpu_supports also asks the operating system about the wide registers.
static bool detect(int isa) {
#ifdef FQUANT_EMULATED
  if (isa > kAvx2) return has_avx2();
#endif
  switch (isa) {
    case kScalar:
      return true;
    case kAvx2:
      return has_avx2();
    case kAvxVnni:
      return has_avx2() && has_avx_vnni();
    case kAvx512Vnni:
      return has_avx2() && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    default:
      return false;
  }
}

// CPUID traps in virtual machines (tens of microseconds), so it is asked once.
bool isa_available(int isa) {
  static const bool available[] = {detect(kScalar), detect(kAvx2), detect(kAvxVnni),
                                   detect(kAvx512Vnni)};
  return isa >= kScalar && isa <= kAvx512Vnni && available[isa];
}
#else
bool isa_available(int isa) { return isa == kScalar; }
#endif

int best_isa() {
  for (int isa = kAvx512Vnni; isa > kScalar; --isa) {
    if (isa_available(isa)) return isa;
  }
  return kScalar;
}

}  // namespace fquant
