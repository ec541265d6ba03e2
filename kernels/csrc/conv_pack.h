// Packed weights: the order in which a path reads them; see PackLayout.
#pragma once

#include "conv.h"

namespace fquant {

// Bytes of the weights in one layout.
int64_t layout_bytes(const PackLayout& layout, int64_t out_channels, int64_t taps,
                     int64_t channels);

// Whether the path for inputs without negative values has a layout of its own.
inline bool packs_again(const ConvPath& path) {
  return path.nonnegative != nullptr && path.nonnegative->layout.segments;
}

// Bytes of the packed weights of a path, those for inputs without negative values included.
int64_t packed_bytes(const ConvPath& path, int64_t out_channels, int64_t taps, int64_t channels);

// `to` has packed_bytes() bytes; weight is (out_channels, taps, channels).
void pack_int8(const ConvPath& path, const int8_t* weight, int64_t out_channels, int64_t taps,
               int64_t channels, void* to);
void pack_float(const ConvPath& path, const float* weight, int64_t out_channels, int64_t taps,
                int64_t channels, void* to);

}  // namespace fquant
