// The block loop, written once over the traits of an instruction set.
//
// Included by each conv_<isa>.cpp inside its anonymous namespace. Nothing here may use a template
// or inline function of the standard library: the linker keeps one copy of those, and it could be
// the copy compiled for AVX-512.
//
// Traits: Elem (feature), Weight, Acc, V, kLanes, kGroup, kTileVectors, kFewWeights (vectors of
// weights that fit in registers beside sums), kUnsigned (weights are taken as w + 128), kSegments
// (weights are in segments), kStage (rows must be widened, and are read where they are staged),
// kFinishLanes (channels that finish takes at most), rows(vectors) = rows of a micro tile, load,
// store, load_weight, broadcast, dot, stage_row, finish.

template <class T>
struct Scratch {
  using Staged = typename T::Staged;
  int32_t* index;           // input row of each pair, taps one after the other
  uint8_t* row;             // its output row within the block
  int64_t* split;           // first pair of each tap
  uint32_t* compensation;   // 128 * sum of the inputs read, per output row
  int32_t* iota;            // 0, 1, ...: the index list of staged rows
  typename T::Acc* acc;     // (rows, channels of the chunk)
  Staged* staged;           // (rows of a tap, steps * group)
};

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class T>
bool stages(const ConvArgs& a) {
  return T::kStage || a.channels % T::kGroup != 0;
}

template <class T>
int64_t carve(const ConvArgs& a, uintptr_t base, Scratch<T>* s) {
  const int64_t pairs = a.taps * kBlockRows + 64;  // whole vectors are stored past the end
  const int64_t width = ceil_div(a.channels, T::kGroup) * T::kGroup;
  int64_t used = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + used);
    used += aligned(count * static_cast<int64_t>(sizeof(*pointer)));
  };
  take(s->acc, kBlockRows * kChunkChannels);
  take(s->compensation, kBlockRows);
  take(s->iota, kBlockRows);
  take(s->split, a.taps + 1);
  take(s->index, pairs);
  take(s->row, pairs);
  take(s->staged, stages<T>(a) ? kBlockRows * width + 64 : 0);
  return used;
}

template <class T>
int64_t scratch_bytes(const ConvArgs& a) {
  Scratch<T> s;
  return carve<T>(a, 0, &s);
}

#include "conv_micro.h"

inline int64_t rows_of_block(const ConvArgs& a, int64_t block) {
  return min64(kBlockRows, a.outputs - block * kBlockRows);
}

bool list_pairs(const ConvArgs& a, int64_t block, int64_t* split, int32_t* index, uint8_t* row) {
  bool in_range = true;
  const int32_t* table = a.neighbors + block * kBlockRows;
  for (int64_t k = 0; k < a.taps; ++k, table += a.outputs) {
    split[k + 1] = split[k] + compact(table, rows_of_block(a, block), a.inputs, index + split[k],
                                      row + split[k], &in_range);
  }
  return in_range;
}

struct Pairs {
  const int64_t* split;
  const int32_t* index;
  const uint8_t* row;
};

template <class T>
void add_compensation(const ConvArgs& a, const Pairs& list, uint32_t* compensation, int64_t rows) {
  const char* features = static_cast<const char*>(a.features);
  const int64_t row_bytes = a.channels * static_cast<int64_t>(sizeof(typename T::Elem));
  __builtin_memset(compensation, 0, rows * sizeof(uint32_t));
  // Short rows of bytes: the processor runs far enough ahead by itself. Layers of 16, 32 and 64 channels
  // 0.59 to 0.45, 1.06 to 0.91 and 3.47 to 3.31 ms (Zen 5, 86k voxels); float rows of 16 lose 12 %.
  if (!T::kUnsigned && sizeof(typename T::Elem) == 1 && row_bytes <= 64) return;
  for (int64_t p = list.split[0]; p < list.split[a.taps]; ++p) {
    const char* from = features + list.index[p] * row_bytes;
    for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(from + i);
    if (T::kUnsigned) {
      compensation[list.row[p]] += 128u * static_cast<uint32_t>(a.row_sums[list.index[p]]);
    }
  }
}

template <class T>
bool block(const ConvArgs& a, void* memory, int64_t block_index) {
  using Elem = typename T::Elem;
  using Weight = typename T::Weight;
  Scratch<T> s;
  carve<T>(a, reinterpret_cast<uintptr_t>(memory), &s);
  const int64_t first = block_index * kBlockRows;
  const int64_t rows = rows_of_block(a, block_index);
  Pairs list{s.split, s.index, s.row};
  if (a.split != nullptr) {
    list = {a.split + block_index * a.taps, a.pair_index, a.pair_row};
  } else {
    s.split[0] = 0;
    if (!list_pairs(a, block_index, s.split, s.index, s.row)) return false;
  }
  add_compensation<T>(a, list, s.compensation, rows);

  const int64_t steps = ceil_div(a.channels, T::kGroup);
  const int64_t width = steps * T::kGroup;
  const int64_t lane_weights = T::kSegments ? segment_lane_bytes(steps) : width;
  const bool staged = stages<T>(a);
  const Elem* features = static_cast<const Elem*>(a.features);
  const Weight* weight = static_cast<const Weight*>(a.packed);
  if (staged) {
    for (int64_t i = 0; i < kBlockRows; ++i) s.iota[i] = static_cast<int32_t>(i);
  }

  // A tap that every row has (the middle one of a submanifold convolution) goes first and sets the
  // sums: nothing to clear, nothing to load.
  int64_t whole = 0;
  while (whole < a.taps && list.split[whole + 1] - list.split[whole] != rows) ++whole;

  for (int64_t channel = 0; channel < a.out_channels; channel += kChunkChannels) {
    const int64_t count = min64(kChunkChannels, a.out_channels - channel);
    const int64_t vectors = ceil_div(count, T::kLanes);
    const int64_t pitch = vectors * T::kLanes;
    const auto run_tap = [&](int64_t k, auto fresh) {
      const int64_t begin = list.split[k], pairs = list.split[k + 1] - begin;
      const int32_t* index = list.index + begin;
      const Weight* w = weight + k * pitch * lane_weights;
      const typename T::Staged* source;
      if (staged) {
        for (int64_t p = 0; p < pairs; ++p) {
          T::stage_row(s.staged + p * width, features + index[p] * a.channels, a.channels, width);
        }
        source = s.staged;
        index = s.iota;
      } else {
        source = reinterpret_cast<const typename T::Staged*>(features);
      }
      for (int64_t v = 0; v < vectors; v += T::kTileVectors) {
        const int64_t tile = min64(T::kTileVectors, vectors - v);
        run_vectors<T, decltype(fresh)::value>(tile, pairs, source, width, index, list.row + begin, w,
                                               steps, s.acc + v * T::kLanes, pitch);
        w += tile * T::kLanes * lane_weights;
      }
    };
    if (whole < a.taps) {
      run_tap(whole, std::true_type{});
    } else {
      __builtin_memset(s.acc, 0, rows * pitch * sizeof(typename T::Acc));
    }
    for (int64_t k = 0; k < a.taps; ++k) {
      if (k != whole) run_tap(k, std::false_type{});
    }
    weight += a.taps * pitch * lane_weights;
    for (int64_t c = 0; c < count; c += T::kFinishLanes) {
      T::finish(a, s.acc + c, pitch, s.compensation, rows, channel + c,
                first * a.out_channels + channel + c, min64(T::kFinishLanes, count - c));
    }
  }
  return true;
}

#include "conv_finish.h"
#include "conv_path.h"
