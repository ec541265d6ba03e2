// Sparse convolution on CPU: what the driver (conv.cpp) and the paths (conv_<isa>.cpp) share.
//
// Output-stationary implicit GEMM. For each block of output rows, the present (row, input) pairs
// of every tap are listed; for each tap, the input rows are multiplied in place with that tap's
// packed weights into accumulators that stay in cache; then the epilogue writes the block. No
// padding work is done and nothing of the size of an im2col matrix exists.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fquant {

constexpr int64_t kBlockRows = 256;     // rows of a block: list entries are uint8
constexpr int64_t kChunkChannels = 64;  // output channels accumulated at a time

enum OutType { kOutInt8 = 0, kOutHalf = 1, kOutFloat = 2 };

struct ConvArgs {
  const void* features;      // (inputs, channels)
  const void* packed;        // weights, as PackLayout says
  const int32_t* neighbors;  // (taps, outputs)
  // The present entries of `neighbors` as lists, or null: blocks one after the other, within each its
  // taps. split: (blocks * taps + 1,), where the pairs of a block and tap begin.
  const int64_t* split;
  const int32_t* pair_index;  // input row
  const uint8_t* pair_row;    // output row within the block
  const float* scale;        // (out_channels,) padded to kChunkChannels; int8 only
  const float* bias;         // the same, or null
  const int8_t* residual;    // (outputs, out_channels), or null; int8 only
  void* out;                 // (outputs, out_channels)
  int32_t* row_sums;         // (inputs,), filled by row_sums()
  int64_t inputs, outputs, taps, channels, out_channels;
  float residual_scale;
  bool relu;
  OutType out_type;
};

// Packed weights: [chunk][tap][tile][step][vector][lane][group], where a chunk is up to
// kChunkChannels output channels, a tile up to tile_vectors vectors of `lanes` output channels, and
// a step `group` input channels. Absent channels are zeros.
struct PackLayout {
  int64_t lanes, group, tile_vectors;
  int64_t elem_bytes;
  bool segments;     // bytes to be summed in int16: see conv_nonnegative_avx2.h
};

// Bytes per output channel of a tap's weights in segments: four of a tile's header; per step of 16
// inputs the weights and up to four starts.
constexpr int64_t segment_lane_bytes(int64_t steps) { return 4 + steps * (16 + 4 * 2); }

// One path. Every function is a plain loop over its range: threads belong to the driver.
struct ConvPath {
  PackLayout layout;
  int64_t (*scratch_bytes)(const ConvArgs&);
  void (*row_sums)(const ConvArgs&, int64_t first, int64_t last);  // null where not needed
  bool (*block)(const ConvArgs&, void* scratch, int64_t index);    // false: neighbor >= inputs
  int64_t (*peak)(int64_t rounds, int32_t* sink);                  // register-only; operations done
  // Appends the pairs of a block from split[0] on, and sets the `taps` splits after it. Up to 64 entries
  // past the last pair are overwritten. False: a neighbor is not below `inputs`.
  bool (*list_pairs)(const ConvArgs&, int64_t block, int64_t* split, int32_t* index, uint8_t* row);

  // A faster path for inputs of which none is negative, or null. Where its layout is not this
  // path's, its packed weights come after this path's.
  const ConvPath* nonnegative;
  bool (*gains)(const ConvArgs&);  // whether it is faster for these sizes
  bool (*is_nonnegative)(const int8_t* features, int64_t count);
};

extern const ConvPath conv_int8_scalar, conv_float_scalar;
#ifdef FQUANT_X86
extern const ConvPath conv_int8_avx2, conv_float_avx2;
extern const ConvPath conv_int8_avxvnni;
extern const ConvPath conv_int8_avx512vnni, conv_float_avx512;
#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace fquant
