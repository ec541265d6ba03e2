// The micro kernel: pairs of one tap times the weights of one tile of output channels.
//
// Included by conv_body.h, which says what the traits T have.

// Few input and output channels: the weights of the tap stay in registers, and pairs are taken one by
// one, their instructions mixed by the processor. Whole layers of 16 and 32 channels, pairs listed,
// against micro_tile: 0.78 and 1.26 ms in place of 0.86 and 1.42 (Zen 5, 86k voxels).
template <class T, int STEPS, int V, bool FRESH>
void few_weights(int64_t pairs, const typename T::Staged* features, const int32_t* index,
                 const uint8_t* row, const typename T::Weight* weight, typename T::Acc* acc,
                 int64_t pitch) {
  constexpr int64_t stride = STEPS * T::kGroup;
  typename T::W w[STEPS][V];
#pragma GCC unroll 8
  for (int s = 0; s < STEPS; ++s) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      w[s][v] = T::load_weight(weight + (s * V + v) * (T::kLanes * T::kGroup));
    }
  }
  for (int64_t p = 0; p < pairs; ++p) {
    const typename T::Staged* x = features + index[p] * stride;
    typename T::Acc* out = acc + row[p] * pitch;
    typename T::V sum[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[v] = FRESH ? T::zero() : T::load(out + v * T::kLanes);
#pragma GCC unroll 8
    for (int s = 0; s < STEPS; ++s) {
      const auto b = T::broadcast(x + s * T::kGroup);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[v] = T::dot(sum[v], w[s][v], b);
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) T::store(out + v * T::kLanes, sum[v]);
  }
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
    x[m] = features + (T::kStage ? m : index[m]) * stride;
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
    if (T::kStage) features += M * stride;
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
      if constexpr (T::kSegments) {
        T::template run_tile<V, FRESH>(pairs, features, stride, index, row, weight, steps, acc,
                                       pitch);
      } else {
        if constexpr (4 * V <= T::kFewWeights) {
          if (steps == 4) {
            return few_weights<T, 4, V, FRESH>(pairs, features, index, row, weight, acc, pitch);
          }
        }
        if constexpr (8 * V <= T::kFewWeights) {
          if (steps == 8) {
            return few_weights<T, 8, V, FRESH>(pairs, features, index, row, weight, acc, pitch);
          }
        }
        run_tile<T, V, FRESH>(pairs, features, stride, index, row, weight, steps, acc, pitch);
      }
    } else {
      run_vectors<T, FRESH, V - 1>(vectors, pairs, features, stride, index, row, weight, steps, acc,
                            pitch);
    }
  }
}
