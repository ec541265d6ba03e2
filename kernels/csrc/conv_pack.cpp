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
  for_each_tile(p, out_channels, taps, [&](int64_t first, int64_t columns, int64_t end, int64_t k) {
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t o = first; o < first + columns; ++o, to += kGroup) {
        const From* from = weight + (o * taps + k) * channels + s * kGroup;
        const int64_t inside = o < end ? min64(kGroup, channels - s * kGroup) : 0;
        if (inside == kGroup) {
          for (int g = 0; g < kGroup; ++g) to[g] = from[g];
        } else {
          for (int g = 0; g < kGroup; ++g) to[g] = static_cast<To>(g < inside ? from[g] : 0);
        }
      }
    }
  });
}

// What two inputs next to each other can add to a sum at most: the sum of their weights below 0 and
// of those above.
struct PairSums {
  int16_t negative, positive;
};

void sum_pairs(const int8_t* weight, int64_t channels, int64_t pairs, PairSums* sums) {
  for (int64_t i = 0; i < pairs; ++i) {
    const int a = 2 * i < channels ? weight[2 * i] : 0;
    const int b = 2 * i + 1 < channels ? weight[2 * i + 1] : 0;
    sums[i].negative = static_cast<int16_t>((a < 0 ? a : 0) + (b < 0 ? b : 0));
    sums[i].positive = static_cast<int16_t>((a > 0 ? a : 0) + (b > 0 ? b : 0));
  }
}

// Where the int16 sums of one output channel of a tap may start so that none wraps: `start` has an
// entry for each (segment, pair of a quad). False: nowhere, segments of so many quads are too long.
//
// Inputs are 0 to 127. A sum of weights w then ends between -127 * sum(-w, w < 0) and
// 127 * sum(w, w > 0), and start plus either must be an int16. In between it may wrap: additions
// modulo 2^16 do not mind. The starts are 0 where that is allowed, and add up to 0.
bool choose_starts(const PairSums* sums, int64_t steps, int quads, int16_t* start) {
  const int64_t count = steps * (4 / quads) * 2;
  int32_t total = 0, low, high;
  const auto range = [&](int64_t i) {
    int32_t negative = 0, positive = 0;
    for (int quad = 0; quad < quads; ++quad) {
      const PairSums& pair = sums[(i / 2 * quads + quad) * 2 + i % 2];
      negative += pair.negative;
      positive += pair.positive;
    }
    low = INT16_MIN - 127 * negative;
    high = INT16_MAX - 127 * positive;
  };
  for (int64_t i = 0; i < count; ++i) {
    range(i);
    if (low > high) return false;
    start[i] = static_cast<int16_t>(low > 0 ? low : high < 0 ? high : 0);
    total += start[i];
  }
  for (int64_t i = 0; i < count && total != 0; ++i) {
    range(i);
    const int32_t wanted = start[i] - total;
    const int32_t moved = wanted < low ? low : wanted > high ? high : wanted;
    total += moved - start[i];
    start[i] = static_cast<int16_t>(moved);
  }
  return total == 0;
}

void pack_segments(const PackLayout& p, const int8_t* weight, int64_t out_channels, int64_t taps,
                   int64_t channels, char* to) {
  const int64_t steps = ceil_div(channels, p.group), pairs = steps * 8, most = steps * 4;
  std::vector<PairSums> sums(p.lanes * p.tile_vectors * pairs);
  std::vector<int16_t> starts(p.lanes * p.tile_vectors * most);
  for_each_tile(p, out_channels, taps, [&](int64_t first, int64_t columns, int64_t end, int64_t k) {
    const auto row = [&](int64_t o) { return weight + ((first + o) * taps + k) * channels; };
    const int64_t present = min64(columns, end - first);
    for (int64_t o = 0; o < present; ++o) sum_pairs(row(o), channels, pairs, &sums[o * pairs]);
    const auto fit = [&](int quads) {
      for (int64_t o = 0; o < present; ++o) {
        if (!choose_starts(&sums[o * pairs], steps, quads, &starts[o * most])) return false;
      }
      return true;
    };
    const int32_t quads = fit(4) ? 4 : fit(2) ? 2 : 1;
    std::memset(to, 0, columns * segment_lane_bytes(steps));
    std::memcpy(to, &quads, sizeof(quads));
    to += columns * 4;
    const int64_t segments = quads == 1 ? 0 : 4 / quads;  // those that have a start
    for (int64_t s = 0; s < steps; ++s, to += columns * (8 + 16)) {
      for (int64_t i = 0; i < segments; ++i) {
        for (int64_t o = 0; o < present; ++o) {
          const int16_t* start = &starts[o * most + (s * segments + i) * 2];
          std::memcpy(to + (i * columns + o) * 4, start, 4);
        }
      }
      char* quad = to + columns * 8;
      for (int64_t c = s * 16; c < s * 16 + 16; c += 4, quad += columns * 4) {
        const int64_t inside = min64(4, channels - c);
        for (int64_t o = 0; o < present; ++o) {
          if (inside == 4) {
            std::memcpy(quad + o * 4, row(o) + c, 4);
          } else if (inside > 0) {
            std::memcpy(quad + o * 4, row(o) + c, inside);
          }
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
  if (!packs_again(path)) return bytes;
  return bytes + packed_bytes(*path.nonnegative, out_channels, taps, channels);
}

void pack_int8(const ConvPath& path, const int8_t* weight, int64_t out_channels, int64_t taps,
               int64_t channels, void* to) {
  const PackLayout& p = path.layout;
  if (p.segments) {
    pack_segments(p, weight, out_channels, taps, channels, static_cast<char*>(to));
  } else if (p.group == 4) {
    pack<int8_t, int8_t, 4>(p, weight, out_channels, taps, channels, static_cast<int8_t*>(to));
  } else if (p.group == 2) {
    pack<int8_t, int16_t, 2>(p, weight, out_channels, taps, channels, static_cast<int16_t*>(to));
  } else {
    pack<int8_t, int16_t, 1>(p, weight, out_channels, taps, channels, static_cast<int16_t*>(to));
  }
  if (packs_again(path)) {
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
