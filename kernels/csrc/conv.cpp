// The driver of the sparse convolutions: packing, scratch, threads, and the C functions.
#include "conv.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "conv_pack.h"
#include "fquant_kernels.h"
#include "isa.h"
#include "parallel.h"

namespace fquant {
namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, Free>;

Memory aligned_memory(int64_t bytes) {
  const size_t size = static_cast<size_t>(bytes + 127) / 64 * 64;
  Memory memory(static_cast<char*>(std::aligned_alloc(64, size)));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

const ConvPath* int8_path(int isa) {
  if (!isa_available(isa)) return nullptr;
  switch (isa) {
#ifdef FQUANT_X86
    case kAvx512Vnni:
      return &conv_int8_avx512vnni;
    case kAvxVnni:
      return &conv_int8_avxvnni;
    case kAvx2:
      return &conv_int8_avx2;
#endif
    default:
      return &conv_int8_scalar;
  }
}

const ConvPath* float_path(int isa) {
  if (!isa_available(isa)) return nullptr;
  switch (isa) {
#ifdef FQUANT_X86
    case kAvx512Vnni:
      return &conv_float_avx512;
    case kAvxVnni:
    case kAvx2:
      return &conv_float_avx2;
#endif
    default:
      return &conv_float_scalar;
  }
}

std::vector<float> padded(const float* values, int64_t count) {
  std::vector<float> result(ceil_div(count, kChunkChannels) * kChunkChannels + kChunkChannels);
  if (values != nullptr) std::memcpy(result.data(), values, count * sizeof(float));
  return result;
}

bool none_is_negative(const ConvPath& path, const ConvArgs& args, int64_t threads) {
  const int8_t* features = static_cast<const int8_t*>(args.features);
  const int64_t count = args.inputs * args.channels, grain = 1 << 20;
  std::atomic<bool> none{true};
  parallel_for(ceil_div(count, grain), threads, [&](int64_t, int64_t i) {
    if (!none) return;
    if (!path.is_nonnegative(features + i * grain, min64(grain, count - i * grain))) none = false;
  });
  return none;
}

int run(const ConvPath& path, ConvArgs args, const float* scale, const float* bias,
        int64_t threads) {
  const std::vector<float> padded_scale = padded(scale, args.out_channels);
  const std::vector<float> padded_bias = padded(bias, args.out_channels);
  args.scale = padded_scale.data();
  args.bias = bias == nullptr ? nullptr : padded_bias.data();

  const int64_t blocks = ceil_div(args.outputs, kBlockRows);
  // A thread costs tens of microseconds; 2^24 multiplications at 400 GOP/s take 80.
  const int64_t work = args.outputs * args.taps * args.channels * args.out_channels / 4;
  threads = min64(threads, min64(blocks, 1 + work / (1 << 22)));
  if (threads < 1) threads = 1;

  if (path.nonnegative != nullptr && path.gains(args) && none_is_negative(path, args, threads)) {
    if (packs_again(path)) {
      args.packed = static_cast<const char*>(args.packed) +
                    layout_bytes(path.layout, args.out_channels, args.taps, args.channels);
    }
    return run(*path.nonnegative, args, scale, bias, threads);
  }
  std::unique_ptr<int32_t[]> sums;
  if (path.row_sums != nullptr) {
    sums.reset(new int32_t[args.inputs]);
    args.row_sums = sums.get();
    const int64_t grain = 16384;
    parallel_for(ceil_div(args.inputs, grain), threads, [&](int64_t, int64_t i) {
      path.row_sums(args, i * grain, min64((i + 1) * grain, args.inputs));
    });
  }

  const int64_t bytes = path.scratch_bytes(args);
  std::vector<Memory> scratch;
  for (int64_t i = 0; i < threads; ++i) scratch.push_back(aligned_memory(bytes));
  std::atomic<bool> in_range{true};
  parallel_for(blocks, threads, [&](int64_t worker, int64_t i) {
    if (in_range && !path.block(args, scratch[worker].get(), i)) in_range = false;
  });
  return in_range ? FQUANT_OK : FQUANT_INDEX_OUT_OF_RANGE;
}

}  // namespace
}  // namespace fquant

using namespace fquant;

extern "C" {

int fquant_isa_available(int isa) { return isa_available(isa) ? 1 : 0; }

int fquant_best_isa(void) { return best_isa(); }

int64_t fquant_packed_bytes(int isa, int is_float, int64_t out_channels, int64_t taps,
                            int64_t channels) {
  const ConvPath* path = is_float != 0 ? float_path(isa) : int8_path(isa);
  if (path == nullptr) return -1;
  return packed_bytes(*path, out_channels, taps, channels);
}

int fquant_pack_int8(int isa, const int8_t* weight, int64_t out_channels, int64_t taps,
                     int64_t channels, void* packed) try {
  const ConvPath* path = int8_path(isa);
  if (path == nullptr) return FQUANT_ISA_UNAVAILABLE;
  pack_int8(*path, weight, out_channels, taps, channels, packed);
  return FQUANT_OK;
} catch (const std::bad_alloc&) {
  return FQUANT_OUT_OF_MEMORY;
}

int fquant_pack_float(int isa, const float* weight, int64_t out_channels, int64_t taps,
                      int64_t channels, void* packed) {
  const ConvPath* path = float_path(isa);
  if (path == nullptr) return FQUANT_ISA_UNAVAILABLE;
  pack_float(*path, weight, out_channels, taps, channels, packed);
  return FQUANT_OK;
}

int fquant_list_pairs(int isa, const int32_t* neighbors, int64_t taps, int64_t outputs,
                      int64_t inputs, int64_t* split, int32_t* index, uint8_t* row) {
  const ConvPath* path = int8_path(isa);
  if (path == nullptr) return FQUANT_ISA_UNAVAILABLE;
  ConvArgs args{};
  args.neighbors = neighbors;
  args.inputs = inputs;
  args.taps = taps;
  args.outputs = outputs;
  split[0] = 0;
  for (int64_t block = 0; block < ceil_div(outputs, kBlockRows); ++block) {
    if (!path->list_pairs(args, block, split + block * taps, index, row)) {
      return FQUANT_INDEX_OUT_OF_RANGE;
    }
  }
  return FQUANT_OK;
}

int fquant_conv_int8(int isa, const int8_t* features, int64_t inputs, int64_t channels,
                     const void* packed, int64_t out_channels, const int32_t* neighbors,
                     const int64_t* split, const int32_t* pair_index, const uint8_t* pair_row,
                     int64_t taps, int64_t outputs, const float* scale, const float* bias,
                     const int8_t* residual, float residual_scale, int relu, int out_type,
                     void* out, int64_t threads) try {
  const ConvPath* path = int8_path(isa);
  if (path == nullptr) return FQUANT_ISA_UNAVAILABLE;
  ConvArgs args{};
  args.features = features;
  args.inputs = inputs;
  args.channels = channels;
  args.packed = packed;
  args.out_channels = out_channels;
  args.neighbors = neighbors;
  args.split = split;
  args.pair_index = pair_index;
  args.pair_row = pair_row;
  args.taps = taps;
  args.outputs = outputs;
  args.residual = residual;
  args.residual_scale = residual_scale;
  args.relu = relu != 0;
  args.out_type = static_cast<OutType>(out_type);
  args.out = out;
  return run(*path, args, scale, bias, threads);
} catch (const std::bad_alloc&) {
  return FQUANT_OUT_OF_MEMORY;
}

int fquant_conv_float(int isa, const float* features, int64_t inputs, int64_t channels,
                      const void* packed, int64_t out_channels, const int32_t* neighbors,
                      int64_t taps, int64_t outputs, const float* bias, float* out,
                      int64_t threads) try {
  const ConvPath* path = float_path(isa);
  if (path == nullptr) return FQUANT_ISA_UNAVAILABLE;
  ConvArgs args{};
  args.features = features;
  args.inputs = inputs;
  args.channels = channels;
  args.packed = packed;
  args.out_channels = out_channels;
  args.neighbors = neighbors;
  args.taps = taps;
  args.outputs = outputs;
  args.out_type = kOutFloat;
  args.out = out;
  return run(*path, args, nullptr, bias, threads);
} catch (const std::bad_alloc&) {
  return FQUANT_OUT_OF_MEMORY;
}

int64_t fquant_peak(int isa, int is_float, int64_t rounds, int32_t* sink) {
  const ConvPath* path = is_float != 0 ? float_path(isa) : int8_path(isa);
  return path == nullptr ? -1 : path->peak(rounds, sink);
}

}  // extern "C"
