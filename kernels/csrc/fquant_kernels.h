// The C interface of the CPU kernels, for ctypes. Pointers are to dense row-major arrays; sizes and
// offsets are int64; every function that can fail returns one of the codes below.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FQUANT_API __attribute__((visibility("default")))

enum {
  FQUANT_OK = 0,
  FQUANT_INDEX_OUT_OF_RANGE = 1,
  FQUANT_OUT_OF_MEMORY = 2,
  FQUANT_ISA_UNAVAILABLE = 3,
  FQUANT_BAD_ARGUMENT = 4,
};

// isa: 0 scalar, 1 AVX2, 2 AVX-VNNI, 3 AVX512-VNNI.
FQUANT_API int fquant_isa_available(int isa);
FQUANT_API int fquant_best_isa(void);

// Packing of weights (out_channels, taps, channels) for one isa; pure.
FQUANT_API int64_t fquant_packed_bytes(int isa, int is_float, int64_t out_channels, int64_t taps,
                                       int64_t channels);
FQUANT_API int fquant_pack_int8(int isa, const int8_t* weight, int64_t out_channels, int64_t taps,
                                int64_t channels, void* packed);
FQUANT_API int fquant_pack_float(int isa, const float* weight, int64_t out_channels, int64_t taps,
                                 int64_t channels, void* packed);

// The present entries of a kernel map as lists (see ConvArgs). split has ceil(outputs / 256) * taps + 1
// entries; index and row have room for taps * outputs + 64.
FQUANT_API int fquant_list_pairs(int isa, const int32_t* neighbors, int64_t taps, int64_t outputs,
                                 int64_t inputs, int64_t* split, int32_t* index, uint8_t* row);

// out_type: 0 int8, 1 float16, 2 float32. bias, residual and the lists of pairs may be null.
FQUANT_API int fquant_conv_int8(int isa, const int8_t* features, int64_t inputs, int64_t channels,
                                const void* packed, int64_t out_channels, const int32_t* neighbors,
                                const int64_t* split, const int32_t* pair_index,
                                const uint8_t* pair_row, int64_t taps, int64_t outputs,
                                const float* scale, const float* bias, const int8_t* residual,
                                float residual_scale, int relu, int out_type, void* out,
                                int64_t threads);
FQUANT_API int fquant_conv_float(int isa, const float* features, int64_t inputs, int64_t channels,
                                 const void* packed, int64_t out_channels,
                                 const int32_t* neighbors, int64_t taps, int64_t outputs,
                                 const float* bias, float* out, int64_t threads);

// Runs the multiply-accumulate instruction of an isa on registers; returns operations done.
FQUANT_API int64_t fquant_peak(int isa, int is_float, int64_t rounds, int32_t* sink);

// Kernel maps. coords are (rows, 1 + dims), int64 or int32; geometry arrays have dims entries.
FQUANT_API int fquant_kernel_neighbors(int isa, int is_int64, const void* coords, int64_t inputs,
                                       const void* out_coords, int64_t outputs, int dims,
                                       const int64_t* shape, const int64_t* kernel,
                                       const int64_t* stride, const int64_t* padding,
                                       const int64_t* dilation, int32_t* table, int64_t threads);
FQUANT_API int fquant_transpose_neighbors(const int32_t* neighbors, int64_t taps, int64_t outputs,
                                          int64_t inputs, int32_t* table, int64_t threads);

// Output voxels in two steps, because their number is a result: a list of keys (null when memory
// is short), then its rows. Taking the rows frees the list; a null `out` only frees.
FQUANT_API void* fquant_output_keys(int is_int64, const void* coords, int64_t count, int dims,
                                    const int64_t* shape, const int64_t* kernel,
                                    const int64_t* stride, const int64_t* padding,
                                    const int64_t* dilation, const int64_t* out_shape,
                                    int transposed, int64_t* num_outputs);
FQUANT_API void fquant_take_coords(void* keys, int is_int64, int dims, const int64_t* out_shape,
                                   void* out);

// Histograms of |x|: x is (rows, columns) and bins_per_unit (rows), both of float or double; counts
// are (rows, num_bins).
FQUANT_API int fquant_abs_histogram(int is_double, const void* x, int64_t rows, int64_t columns,
                                    const void* bins_per_unit, int64_t num_bins, int64_t* counts,
                                    int64_t threads);

#ifdef __cplusplus
}
#endif
