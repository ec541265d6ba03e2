// Kernel maps: the C interface, and which method makes a table.
#include "kernel_map.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "fquant_kernels.h"
#include "isa.h"
#include "parallel.h"

namespace fquant {
namespace {

// `condition ? base + offset : other` without a branch: the compiler turns the plain one into a
// jump around the store, and with it transposing took 5.7 ms in place of 2.8. The address
// is made of integers because base + offset need not exist where the condition is false.
inline int32_t* select(bool condition, int32_t* base, int64_t offset, int32_t* other) {
  uintptr_t mask = static_cast<uintptr_t>(0) - static_cast<uintptr_t>(condition);
  __asm__("" : "+r"(mask));  // hides from the compiler what the mask can be
  const uintptr_t there =
      reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(offset) * sizeof(int32_t);
  return reinterpret_cast<int32_t*>((there & mask) | (reinterpret_cast<uintptr_t>(other) & ~mask));
}

// Asks for huge pages under a fresh table: at a million voxels the faults of 108 MB by 4 KiB took
// 32 ms, as long as everything else. Memory that has its pages already is not changed.
void prefer_huge_pages(int32_t* table, int64_t entries) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(table) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = reinterpret_cast<uintptr_t>(table + entries) & ~(kPage - 1);
  if (end > begin && end - begin >= 2 * kPage) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  (void)table, (void)entries;
#endif
}

template <class T>
void neighbors(const T* coords, int64_t inputs, const T* out_coords, int64_t outputs,
               const Geometry& g, int32_t* table, int64_t threads) {
  const int64_t entries = g.taps() * outputs;
  prefer_huge_pages(table, entries);
  if (inputs == 0 || outputs == 0) {
    std::fill(table, table + entries, -1);
  } else if (!brick_neighbors(coords, inputs, out_coords, outputs, g, table, threads) &&
             !brick_input_neighbors(coords, inputs, out_coords, outputs, g, table, threads) &&
             !input_neighbors(coords, inputs, out_coords, outputs, g, table, threads) &&
             !output_neighbors(coords, inputs, out_coords, outputs, g, table, threads)) {
    sorted_neighbors(coords, inputs, out_coords, outputs, g, table, threads);
  }
}

}  // namespace
}  // namespace fquant

using namespace fquant;

extern "C" {

int fquant_kernel_neighbors(int isa, int is_int64, const void* coords, int64_t inputs,
                            const void* out_coords, int64_t outputs, int dims,
                            const int64_t* shape, const int64_t* kernel, const int64_t* stride,
                            const int64_t* padding, const int64_t* dilation, int32_t* table,
                            int64_t threads) try {
  if (dims < 1 || dims > kMaxDims || !isa_available(isa)) return FQUANT_BAD_ARGUMENT;
  const Geometry g{dims, shape, kernel, stride, padding, dilation, isa};
  if (is_int64 != 0) {
    neighbors(static_cast<const int64_t*>(coords), inputs, static_cast<const int64_t*>(out_coords),
              outputs, g, table, threads);
  } else {
    neighbors(static_cast<const int32_t*>(coords), inputs, static_cast<const int32_t*>(out_coords),
              outputs, g, table, threads);
  }
  return FQUANT_OK;
} catch (const std::bad_alloc&) {
  return FQUANT_OUT_OF_MEMORY;
}

int fquant_transpose_neighbors(const int32_t* neighbors, int64_t taps, int64_t outputs,
                               int64_t inputs, int32_t* table, int64_t threads) try {
  std::atomic<bool> in_range{true};
  parallel_for(taps, threads, [&](int64_t, int64_t k) {
    const int32_t* from = neighbors + k * outputs;
    int32_t* to = table + k * inputs;
    std::fill(to, to + inputs, -1);
    bool wrong = false;
    int32_t unused = 0;
    for (int64_t m = 0; m < outputs; ++m) {
      const int64_t source = from[m];
      wrong |= source >= inputs;
      const bool present = static_cast<uint64_t>(source) < static_cast<uint64_t>(inputs);
      *select(present, to, source, &unused) = static_cast<int32_t>(m);
    }
    if (wrong) in_range = false;
  });
  return in_range ? FQUANT_OK : FQUANT_INDEX_OUT_OF_RANGE;
} catch (const std::bad_alloc&) {
  return FQUANT_OUT_OF_MEMORY;
}

}  // extern "C"
