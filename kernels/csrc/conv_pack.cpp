#include "conv_pack.h"

#include <cstring>
#include <vector>

namespace fquant {
namespace {

// Calls tile(first, columns, end, k): `columns` output channels from `first` on of tap k, of which
// those from `end` on are absent.
template <class Tile>
void for_each_tile(const PackLayout& p, int64_t out_channels, int64_t taps, const Tile& tile) {
  for (int64_t chunk = 0; chunk < out_channels; chunk += kChunkChannels) {
    const int64_t end = min64(chunk + kChunkChannels, out_channels);
    for (int64_t k = 0; k < taps; ++k) {
      for (int64_t first = chunk; first < end; first += p.lanes * p.tile_vectors) {
        const int64_t vectors = min64(p.tile_vectors, ceil_div(end - first, p.lanes));
        tile(first, vectors * p.lanes, end, k);
      }
    }
  }
}

template <class From, class To, int kGroup>
void pack(const PackLayout& p, const From* weight, int64_t out_channels, int64_t taps,
          int64_t channels, To* to) {
  const int64_t steps = ceil_div(channels, kGroup);
  const int shift = p.is_unsigned ? 128 : 0;
  for_each_tile(p, out_channels, taps, [&](int64_t first, int64_t columns, int64_t end, int64_t k) {
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t o = first; o < first + columns; ++o, to += kGroup) {
        const From* from = weight + (o * taps + k) * channels + s * kGroup;
        for (int g = 0; g < kGroup; ++g) {
          const bool inside = o < end && s * kGroup + g < channels;
          to[g] = inside ? static_cast<To>(from[g] + shift) : To{0};
        }
      }
    }
  });
}

// Where the int16 sums of one output channel of a tile may start so that none wraps: `start` has an
// entry for each (segment, pair of inputs in a quad). False: nowhere, such segments are too long.
//
// Inputs are 0 to 127. A sum of weights w then ends between -127 * sum(-w, w < 0) and
// 127 * sum(w, w > 0), and start plus either must be an int16. In between it may wrap: additions
// modulo 2^16 do not mind. The starts are 0 where that is allowed, and add up to 0.
bool choose_starts(const int8_t* weight, int64_t channels, int64_t steps, int segment,
                   int16_t* start) {
  const int64_t sums = steps * (4 / segment) * 2;
  int32_t total = 0;
  const auto range = [&](int64_t i, int32_t* low, int32_t* high) {
    int32_t negative = 0, positive = 0;
    for (int64_t quad = i / 2 * segment; quad < (i / 2 + 1) * segment; ++quad) {
      for (int64_t c = quad * 4 + i % 2 * 2; c < min64(quad * 4 + i % 2 * 2 + 2, channels); ++c) {
        (weight[c] < 0 ? negative : positive) += weight[c];
      }
    }
    *low = INT16_MIN - 127 * negative;
    *high = INT16_MAX - 127 * positive;
  };
  int32_t low, high;
  for (int64_t i = 0; i < sums; ++i) {
    range(i, &low, &high);
    if (low > high) return false;
    start[i] = static_cast<int16_t>(low > 0 ? low : high < 0 ? high : 0);
    total += start[i];
  }
  for (int64_t i = 0; i < sums && total != 0; ++i) {
    range(i, &low, &high);
    const int32_t wanted = start[i] - total;
    const int32_t moved = wanted < low ? low : wanted > high ? high : wanted;
    total += moved - start[i];
    start[i] = static_cast<int16_t>(moved);
  }
  return total == 0;
}

void pack_segments(const PackLayout& p, const int8_t* weight, int64_t out_channels, int64_t taps,
                   int64_t channels, char* to) {
  const int64_t steps = ceil_div(channels, p.group);
  std::vector<int16_t> starts(p.lanes * p.tile_vectors * steps * 4);
  for_each_tile(p, out_channels, taps, [&](int64_t first, int64_t columns, int64_t end, int64_t k) {
    const auto row = [&](int64_t o) { return weight + (o * taps + k) * channels; };
    int segment = 4;
    const auto fits = [&] {
      for (int64_t o = first; o < min64(first + columns, end); ++o) {
        int16_t* start = starts.data() + (o - first) * steps * 4;
        if (!choose_starts(row(o), channels, steps, segment, start)) return false;
      }
      return true;
    };
    while (segment > 1 && !fits()) segment /= 2;
    std::memset(to, 0, columns * segment_lane_bytes(steps));
    std::memcpy(to, &segment, sizeof(segment));
    to += columns * 4;
    for (int64_t s = 0; s < steps; ++s) {
      int16_t* start = reinterpret_cast<int16_t*>(to);
      const int pieces = segment == 1 ? 0 : 4 / segment;
      for (int piece = 0; piece < pieces; ++piece) {
        for (int64_t o = 0; o < columns; ++o, start += 2) {
          if (first + o >= end) continue;
          std::memcpy(start, &starts[o * steps * 4 + (s * pieces + piece) * 2], 4);
        }
      }
      to += columns * 8;
      for (int64_t quad = s * 4; quad < s * 4 + 4; ++quad) {
        for (int64_t o = first; o < first + columns; ++o, to += 4) {
          const int64_t count = min64(4, channels - quad * 4);
          if (o < end && count > 0) std::memcpy(to, row(o) + quad * 4, count);
        }
      }
    }
  });
}

}  // namespace

int64_t layout_bytes(const PackLayout& p, int64_t out_channels, int64_t taps,
                     int64_t channels) {
  const int64_t full = out_channels / kChunkChannels, rest = out_channels % kChunkChannels;
  const int64_t columns = full * kChunkChannels + ceil_div(rest, p.lanes) * p.lanes;
  const int64_t steps = ceil_div(channels, p.group);
  return columns * taps * (p.segments ? segment_lane_bytes(steps) : steps * p.group * p.elem_bytes);
}

int64_t packed_bytes(const ConvPath& path, int64_t out_channels, int64_t taps, int64_t channels) {
  const int64_t bytes = layout_bytes(path.layout, out_channels, taps, channels);
  if (path.nonnegative == nullptr) return bytes;
  return bytes + packed_bytes(*path.nonnegative, out_channels, taps, channels);
}

void pack_int8(const ConvPath& path, const int8_t* weight, int64_t out_channels, int64_t taps,
               int64_t channels, void* to) {
  const PackLayout& p = path.layout;
  if (p.segments) {
    pack_segments(p, weight, out_channels, taps, channels, static_cast<char*>(to));
  } else if (p.group == 4) {
    pack<int8_t, uint8_t, 4>(p, weight, out_channels, taps, channels, static_cast<uint8_t*>(to));
  } else if (p.group == 2) {
    pack<int8_t, int16_t, 2>(p, weight, out_channels, taps, channels, static_cast<int16_t*>(to));
  } else {
    pack<int8_t, int16_t, 1>(p, weight, out_channels, taps, channels, static_cast<int16_t*>(to));
  }
  if (path.nonnegative != nullptr) {
    pack_int8(*path.nonnegative, weight, out_channels, taps, channels,
              static_cast<char*>(to) + layout_bytes(p, out_channels, taps, channels));
  }
}

void pack_float(const ConvPath& path, const float* weight, int64_t out_channels, int64_t taps,
                int64_t channels, void* to) {
  pack<float, float, 1>(path.layout, weight, out_channels, taps, channels,
                        static_cast<float*>(to));
}

}  // namespace fquant
