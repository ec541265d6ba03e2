// Inputs of which none is negative, as after a ReLU, AVX2: bytes summed in int16 for a while.
//
// Included by conv_avx2.cpp inside its anonymous namespace. vpmaddubsw multiplies 32 bytes, twice
// what vpmaddwd does, and adds products two by two in int16; of inputs from 0 to 127 two products
// never saturate. What follows is added modulo 2^16 over a segment of 4, 2 or 1 quads of inputs and
// only then widened to int32, which is exact because packing (choose_starts() in conv_pack.cpp)
// took segments and first values from which the last value of every sum is an int16.
//
// A tile is [vector][lane] int32, the first of them the quads of a segment, then for each step of
// 16 inputs room for four starts per lane, [segment][vector][lane][2] int16, and the weights,
// [quad][vector][lane][4] int8.
//
// One row at a time, its weights read as memory operands: 6 rows by 2 vectors, with weights and
// sums in registers as in conv_micro.h, come to 60 GMAC/s in L1 at 64 channels (Zen 3), 3 by 4 to
// 100, 1 by 4 to 115.

struct NonnegativeTraits : Int8Base {
  using Staged = int8_t;
  using Weight = int8_t;
  static constexpr int64_t kGroup = 16;
  static constexpr int kTileVectors = 4;
  static constexpr bool kUnsigned = false, kSegments = true, kStage = false;
  // Steps whose weights, 768 bytes of 4 vectors, stay in L1 for all rows of a block.
  static constexpr int64_t kMostSteps = 24;

  static void stage_row(Staged* to, const Elem* from, int64_t channels, int64_t width) {
    __builtin_memcpy(to, from, channels);
    __builtin_memset(to + channels, 0, width - channels);
  }

  static __m256i load_bytes(const int8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }

  // Adds the products of one segment of quads to the sums of V vectors.
  template <int V, int SEGMENT>
  static inline __attribute__((always_inline)) void add_segment(const int8_t* x,
                                                                const int8_t* start,
                                                                const int8_t* weight,
                                                                __m256i* sum) {
    __m256i part[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) part[v] = SEGMENT == 1 ? zero() : load_bytes(start + v * 32);
#pragma GCC unroll 4
    for (int quad = 0; quad < SEGMENT; ++quad) {
      const __m256i b = broadcast4(x + quad * 4);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const __m256i w = load_bytes(weight + (quad * V + v) * 32);
        __m256i total = _mm256_add_epi16(part[v], _mm256_maddubs_epi16(b, w));
        __asm__("" : "+x"(total));  // as in conv_rows_avx2.h
        part[v] = total;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sum[v] = _mm256_add_epi32(sum[v], _mm256_madd_epi16(part[v], _mm256_set1_epi16(1)));
    }
  }

  template <int V, int SEGMENT, bool FRESH>
  static inline __attribute__((always_inline)) void add_row(const int8_t* x, const int8_t* weight,
                                                            int64_t steps, int32_t* acc) {
    __m256i sum[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[v] = FRESH ? zero() : load(acc + v * kLanes);
    for (int64_t s = 0; s < steps; ++s, x += kGroup, weight += V * 192) {
#pragma GCC unroll 4
      for (int i = 0; i < 4 / SEGMENT; ++i) {
        add_segment<V, SEGMENT>(x + i * SEGMENT * 4, weight + i * V * 32,
                                weight + V * 64 + i * SEGMENT * V * 32, sum);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(acc + v * kLanes, sum[v]);
  }

  // Not inlined: with what surrounds it, its loops keep fewer variables in registers and take 8 to
  // 15 % more.
  template <int V, int SEGMENT, bool FRESH>
  static __attribute__((noinline)) void add_rows(int64_t pairs, const int8_t* features,
                                                 int64_t stride, const int32_t* index,
                                                 const uint8_t* row, const int8_t* weight,
                                                 int64_t steps, int32_t* acc, int64_t pitch) {
    for (int64_t p = 0; p < pairs; ++p) {
      add_row<V, SEGMENT, FRESH>(features + index[p] * stride, weight, steps, acc + row[p] * pitch);
    }
  }

  template <int V, bool FRESH>
  static void run_tile(int64_t pairs, const int8_t* features, int64_t stride, const int32_t* index,
                       const uint8_t* row, const int8_t* weight, int64_t steps, int32_t* acc,
                       int64_t pitch) {
    int32_t quads;
    __builtin_memcpy(&quads, weight, sizeof(quads));
    weight += V * 32;
    const auto add_all = [&](auto segment) {
      constexpr int kSegment = decltype(segment)::value;
      add_rows<V, kSegment, FRESH>(pairs, features, stride, index, row, weight,
                                   min64(kMostSteps, steps), acc, pitch);
      for (int64_t s = kMostSteps; s < steps; s += kMostSteps) {
        add_rows<V, kSegment, false>(pairs, features + s * kGroup, stride, index, row,
                                     weight + s * (V * 192), min64(kMostSteps, steps - s), acc,
                                     pitch);
      }
    };
    if (quads == 4) {
      add_all(std::integral_constant<int, 4>{});
    } else if (quads == 2) {
      add_all(std::integral_constant<int, 2>{});
    } else {
      add_all(std::integral_constant<int, 1>{});
    }
  }

  static void finish(const ConvArgs& a, const Acc* acc, int64_t pitch, const uint32_t* none,
                     int64_t rows, int64_t channel, int64_t at, int64_t count) {
    Int8Traits::finish(a, acc, pitch, none, rows, channel, at, count);
  }
};

// As peak() of conv_path.h: segments of 4 quads, without memory.
int64_t nonnegative_peak(int64_t rounds, int32_t* sink) {
  constexpr int V = 8;
  alignas(32) int32_t lanes[8];
  for (auto& lane : lanes) lane = *sink;
  __m256i b = _mm256_set1_epi8(1);
  const __m256i weight = NonnegativeTraits::load(lanes), one = _mm256_set1_epi16(1);
  __m256i sum = _mm256_setzero_si256();
  for (int64_t round = 0; round < rounds; ++round) {
    __m256i part[V] = {};
#pragma GCC unroll 4
    for (int quad = 0; quad < 4; ++quad) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        __asm__ volatile("" : "+x"(b));  // else a product would be computed once, before the loop
        __m256i total = _mm256_add_epi16(part[v], _mm256_maddubs_epi16(b, weight));
        __asm__("" : "+x"(total));
        part[v] = total;
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(part[v], one));
  }
  NonnegativeTraits::store(lanes, sum);
  for (const int32_t lane : lanes) *sink += lane;
  return rounds * V * 4 * 32 * 2;
}
