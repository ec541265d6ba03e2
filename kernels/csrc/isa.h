// The instruction sets this library has paths for, and which of them run here.
#pragma once

#include <cstdint>

namespace fquant {

enum Isa { kScalar = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512Vnni = 3 };

bool isa_available(int isa);
int best_isa();

}  // namespace fquant
