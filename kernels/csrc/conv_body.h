// The block loop, written once over the traits of an instruction set.
//
// Included by each conv_<isa>.cpp inside its anonymous namespace. Nothing here may use a template
// or inline function of the standard library: the linker keeps one copy of those, and it could be
// the copy compiled for AVX-512.
//
// Traits: Elem (feature), Weight, Acc, V, kLanes, kGroup, kTileVectors, kUnsigned (weights are
// w + 128), kStage (rows must be widened), rows(vectors) = rows of a micro tile, load, store,
// load_weight, broadcast, dot, stage_row, finish.

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

template <class T, int V, int M, bool FRESH>
inline __attribute__((always_inline)) void micro_tile(
    const typename T::Staged* features, int64_t stride, const int32_t* index, const uint8_t* row,
    const typename T::Weight* weight, int64_t steps, typename T::Acc* acc, int64_t pitch) {
  typename T::V sum[M][V];
  const typename T::Staged* x[M];
  typename T::Acc* out[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    x[m] = features + index[m] * stride;
    out[m] = acc + row[m] * pitch;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      sum[m][v] = FRESH ? T::zero() : T::load(out[m] + v * T::kLanes);
    }
  }
  // Unrolled by 4: 583 to 647 GOP/s at C = 64. A loop of known length is slower: 377 to 319 at 32.
#pragma GCC unroll 4
  for (int64_t s = 0; s < steps; ++s) {
    typename T::W w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      w[v] = T::load_weight(weight + (s * V + v) * (T::kLanes * T::kGroup));
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const auto b = T::broadcast(x[m] + s * T::kGroup);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[m][v] = T::dot(sum[m][v], w[v], b);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) T::store(out[m] + v * T::kLanes, sum[m][v]);
  }
}

template <class T, int V, int M, bool FRESH>
inline __attribute__((always_inline)) void last_rows(
    int64_t left, const typename T::Staged* features, int64_t stride, const int32_t* index,
    const uint8_t* row, const typename T::Weight* weight, int64_t steps, typename T::Acc* acc,
    int64_t pitch) {
  if constexpr (M > 0) {
    if (left == M) {
      micro_tile<T, V, M, FRESH>(features, stride, index, row, weight, steps, acc, pitch);
    } else {
      last_rows<T, V, M - 1, FRESH>(left, features, stride, index, row, weight, steps, acc, pitch);
    }
  }
}

template <class T, int V, bool FRESH>
void run_tile(int64_t pairs, const typename T::Staged* features, int64_t stride,
              const int32_t* index, const uint8_t* row, const typename T::Weight* weight,
              int64_t steps, typename T::Acc* acc, int64_t pitch) {
  constexpr int M = T::rows(V);
  int64_t p = 0;
  for (; p + M <= pairs; p += M) {
    micro_tile<T, V, M, FRESH>(features, stride, index + p, row + p, weight, steps, acc, pitch);
  }
  last_rows<T, V, M - 1, FRESH>(pairs - p, features, stride, index + p, row + p, weight, steps,
                                acc, pitch);
}

template <class T, bool FRESH, int V = T::kTileVectors>
void run_vectors(int64_t vectors, int64_t pairs, const typename T::Staged* features, int64_t stride,
                 const int32_t* index, const uint8_t* row, const typename T::Weight* weight,
                 int64_t steps, typename T::Acc* acc, int64_t pitch) {
  if constexpr (V > 0) {
    if (vectors == V) {
      run_tile<T, V, FRESH>(pairs, features, stride, index, row, weight, steps, acc, pitch);
    } else {
      run_vectors<T, FRESH, V - 1>(vectors, pairs, features, stride, index, row, weight, steps, acc,
                            pitch);
    }
  }
}

template <class T>
bool list_pairs(const ConvArgs& a, const Scratch<T>& s, int64_t first, int64_t rows) {
  int64_t count = 0;
  bool in_range = true;
  for (int64_t k = 0; k < a.taps; ++k) {
    s.split[k] = count;
    const int32_t* table = a.neighbors + k * a.outputs + first;
    count += compact(table, rows, a.inputs, s.index + count, s.row + count, &in_range);
  }
  s.split[a.taps] = count;
  return in_range;
}

template <class T>
void add_compensation(const ConvArgs& a, const Scratch<T>& s, int64_t rows) {
  const char* features = static_cast<const char*>(a.features);
  const int64_t row_bytes = a.channels * static_cast<int64_t>(sizeof(typename T::Elem));
  if (T::kUnsigned) __builtin_memset(s.compensation, 0, rows * sizeof(uint32_t));
  for (int64_t p = 0; p < s.split[a.taps]; ++p) {
    __builtin_prefetch(features + s.index[p] * row_bytes);
    if (T::kUnsigned) {
      s.compensation[s.row[p]] += 128u * static_cast<uint32_t>(a.row_sums[s.index[p]]);
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
  const int64_t rows = min64(kBlockRows, a.outputs - first);
  if (!list_pairs<T>(a, s, first, rows)) return false;
  add_compensation<T>(a, s, rows);

  const int64_t steps = ceil_div(a.channels, T::kGroup);
  const int64_t width = steps * T::kGroup;
  const bool staged = stages<T>(a);
  const Elem* features = static_cast<const Elem*>(a.features);
  const Weight* weight = static_cast<const Weight*>(a.packed);
  if (staged) {
    for (int64_t i = 0; i < kBlockRows; ++i) s.iota[i] = static_cast<int32_t>(i);
  }

  // A tap that every row has (the middle one of a submanifold convolution) goes first and sets the
  // sums: nothing to clear, nothing to load.
  int64_t whole = 0;
  while (whole < a.taps && s.split[whole + 1] - s.split[whole] != rows) ++whole;

  for (int64_t channel = 0; channel < a.out_channels; channel += kChunkChannels) {
    const int64_t count = min64(kChunkChannels, a.out_channels - channel);
    const int64_t vectors = ceil_div(count, T::kLanes);
    const int64_t pitch = vectors * T::kLanes;
    const auto run_tap = [&](int64_t k, auto fresh) {
      const int64_t begin = s.split[k], pairs = s.split[k + 1] - begin;
      const int32_t* index = s.index + begin;
      const Weight* w = weight + k * pitch * width;
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
        run_vectors<T, decltype(fresh)::value>(tile, pairs, source, width, index, s.row + begin, w,
                                               steps, s.acc + v * T::kLanes, pitch);
        w += tile * T::kLanes * width;
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
    weight += a.taps * pitch * width;
    for (int64_t v = 0; v < vectors; ++v) {
      T::finish(a, s.acc + v * T::kLanes, pitch, s.compensation, rows, channel + v * T::kLanes,
                first * a.out_channels + channel + v * T::kLanes,
                min64(T::kLanes, count - v * T::kLanes));
    }
  }
  return true;
}

// The int8 epilogue (D10) of one vector of channels, each operation rounded on its own.
// F: the float operations of the ISA; sum(r): the exact sums of row r as floats.
template <class F, bool BIAS, bool RESIDUAL, bool RELU, class Sum>
inline void finish_rows(const ConvArgs& a, const Sum& sum, int64_t rows, int64_t channel,
                        int64_t at, int64_t count) {
  const auto scale = F::load(a.scale + channel);
  const auto bias = BIAS ? F::load(a.bias + channel) : scale;
  const auto residual_scale = F::set(a.residual_scale);
  for (int64_t r = 0; r < rows; ++r, at += a.out_channels) {
    auto t = F::mul(sum(r), scale);
    if (BIAS) t = F::add(t, bias);
    if (RESIDUAL) t = F::add(t, F::mul(residual_scale, F::load_int8(a.residual + at, count)));
    if (RELU) t = F::relu(t);
    if (a.out_type == kOutInt8) {
      F::store_int8(static_cast<int8_t*>(a.out) + at, t, count);
    } else if (a.out_type == kOutHalf) {
      F::store_half(static_cast<uint16_t*>(a.out) + at, t, count);
    } else {
      F::store(static_cast<float*>(a.out) + at, t, count);
    }
  }
}

template <class F, class Sum>
inline void finish_int8(const ConvArgs& a, const Sum& sum, int64_t rows, int64_t channel,
                        int64_t at, int64_t count) {
  const auto with_relu = [&](auto bias, auto residual) {
    if (a.relu) {
      finish_rows<F, bias.value, residual.value, true>(a, sum, rows, channel, at, count);
    } else {
      finish_rows<F, bias.value, residual.value, false>(a, sum, rows, channel, at, count);
    }
  };
  const auto with_residual = [&](auto bias) {
    if (a.residual != nullptr) {
      with_relu(bias, std::true_type{});
    } else {
      with_relu(bias, std::false_type{});
    }
  };
  if (a.bias != nullptr) {
    with_residual(std::true_type{});
  } else {
    with_residual(std::false_type{});
  }
}

// As many independent sums as a micro tile has, and no memory: what the instruction can do at most.
template <class T>
int64_t peak(int64_t rounds, int32_t* sink) {
  constexpr int kSums = T::kTileVectors * T::rows(T::kTileVectors);
  alignas(64) typename T::Acc lanes[T::kLanes] = {};
  alignas(64) typename T::Weight ones[T::kLanes * T::kGroup];
  for (auto& one : ones) one = 1;
  alignas(64) typename T::Staged x[T::kGroup] = {};
  typename T::V sum[kSums];
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) {
    lanes[0] = static_cast<typename T::Acc>(*sink + i);  // else equal sums become one
    sum[i] = T::load(lanes);
  }
  const auto w = T::load_weight(ones);
  const auto b = T::broadcast(x);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sum[i] = T::dot(sum[i], w, b);
  }
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) {
    T::store(lanes, sum[i]);
    for (int64_t lane = 0; lane < T::kLanes; ++lane) *sink += static_cast<int32_t>(lanes[lane]);
  }
  return rounds * kSums * T::kLanes * T::kGroup * 2;
}

template <class T>
bool always(const ConvArgs&) {
  return true;
}

template <class T>
constexpr ConvPath make_path(void (*row_sums)(const ConvArgs&, int64_t, int64_t)) {
  return ConvPath{{T::kLanes, T::kGroup, T::kTileVectors, sizeof(typename T::Weight), T::kUnsigned},
                  scratch_bytes<T>,
                  always<T>,
                  row_sums,
                  block<T>,
                  peak<T>};
}
