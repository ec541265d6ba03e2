// 16 or 32 channels to few, AVX2: one output row after the other, its sums in registers.
//
// Included by conv_avx2.cpp inside its anonymous namespace. With so few channels the block loop of
// conv_body.h spends most of its time on lists, on widening rows and on loading and storing sums.
// Here the taps of a row are bits of a mask, rows are widened in registers, and 16 output channels
// are summed at a time: their weights, 14 or 28 kB of 27 taps, are all that L1 has to hold.
// Against the block loop, kitti / waymo (Zen 3, ns per output row): 16 to 16 channels 46 / 53
// before, 39 / 45 here; 16 to 64 channels 113 / 132 and 103 / 123; 32 to 16 channels 62 / 75 and
// 53 / 68; 32 to 32 channels the same; 32 to 64 channels 165 / 200 before, 170 / 209 here.

constexpr int64_t kMostRowTaps = 31;  // a bit each

struct RowScratch {
  int32_t* acc;       // (kBlockRows, 16)
  uint32_t* present;  // the taps each row has, as bits
  int16_t* weight;    // see repack()
};

int64_t carve_rows(const ConvArgs& a, uintptr_t base, RowScratch* s) {
  int64_t used = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + used);
    used += aligned(count * static_cast<int64_t>(sizeof(*pointer)));
  };
  take(s->acc, kBlockRows * 16);
  take(s->present, kBlockRows);
  take(s->weight, a.taps * a.channels * 16);
  return used;
}

// Marks the taps of rows [first, first + rows); false: an entry is not below `inputs`.
bool read_table(const ConvArgs& a, const RowScratch& s, int64_t first, int64_t rows) {
  const __m256i sign = _mm256_set1_epi32(INT32_MIN), none = _mm256_set1_epi32(-1);
  const __m128i unused = _mm_cvtsi32_si128(static_cast<int>(32 - a.taps));
  __m256i largest = none;
  for (int64_t r = 0; r < rows; r += 8) {
    const int32_t* table = a.neighbors + first + r;
    __m256i absent = _mm256_setzero_si256();  // a bit comes in at the top and moves down
    for (int64_t k = 0; k < a.taps; ++k, table += a.outputs) {
      _mm_prefetch(reinterpret_cast<const char*>(table) + kBlockRows * 4, _MM_HINT_T0);
      const __m256i entry = load_entries(table, rows - r);
      largest = _mm256_max_epi32(largest, entry);
      absent = _mm256_or_si256(_mm256_srli_epi32(absent, 1), _mm256_and_si256(entry, sign));
    }
    absent = _mm256_srl_epi32(_mm256_xor_si256(absent, none), unused);
    _mm256_store_si256(reinterpret_cast<__m256i*>(s.present + r), absent);
  }
  return all_below(largest, a.inputs);
}

// The weights of 16 output channels as [tap][16 inputs][pair % 4][output / 4][pair / 4][output % 4]
// of pairs of inputs: what a shuffle within 128 bits makes of a widened row then serves 4 outputs.
void repack(const ConvArgs& a, int64_t channel, int16_t* to) {
  const int64_t pitch = a.out_channels * a.channels;  // of a tap: all outputs are one chunk
  const int16_t* packed = static_cast<const int16_t*>(a.packed) + channel * a.channels;
  const auto copy = [&](const int16_t* from) {
    _mm_store_si128(reinterpret_cast<__m128i*>(to),
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    to += 8;
  };
  for (int64_t k = 0; k < a.taps; ++k, packed += pitch) {
    for (const int16_t* from = packed; from < packed + a.channels * 16; from += 256) {
      for (int pair = 0; pair < 4; ++pair) {
        for (int outputs = 0; outputs < 4; ++outputs) {
          copy(from + pair * 32 + outputs * 8);
          copy(from + (pair + 4) * 32 + outputs * 8);
        }
      }
    }
  }
}

template <int CHANNELS>
void accumulate_rows(const ConvArgs& a, const RowScratch& s, int64_t first, int64_t rows) {
  const int8_t* features = static_cast<const int8_t*>(a.features);
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t* table = a.neighbors + first + r;
    __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                      _mm256_setzero_si256()};
    for (uint32_t left = s.present[r]; left != 0; left = _blsr_u32(left)) {
      const int64_t k = _tzcnt_u32(left);
      const int8_t* x = features + int64_t{table[k * a.outputs]} * CHANNELS;
      const int16_t* w = s.weight + k * (CHANNELS * 16);
#pragma GCC unroll 2
      for (int c = 0; c < CHANNELS; c += 16) {
        const __m256i wide =
            _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + c)));
        const auto add = [&](__m256i pairs, const int16_t* weights) {
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const __m256i four =
                _mm256_load_si256(reinterpret_cast<const __m256i*>(weights + i * 16));
            sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, four));
            // Keeps additions between multiplications, where the compiler would group them: Zen 3
            // then takes 3.7 ns in place of 4.1 to 6.0 per pair at 16 channels, 7.7 and 11.4 at 32.
            __asm__("" : "+x"(sum[i]));
          }
        };
        add(_mm256_shuffle_epi32(wide, 0x00), w + c * 16);
        add(_mm256_shuffle_epi32(wide, 0x55), w + c * 16 + 64);
        add(_mm256_shuffle_epi32(wide, 0xaa), w + c * 16 + 128);
        add(_mm256_shuffle_epi32(wide, 0xff), w + c * 16 + 192);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m256i one = sum[2 * v], two = sum[2 * v + 1];
      const __m256i total = _mm256_add_epi32(_mm256_permute2x128_si256(one, two, 0x20),
                                             _mm256_permute2x128_si256(one, two, 0x31));
      _mm256_store_si256(reinterpret_cast<__m256i*>(s.acc + r * 16 + v * 8), total);
    }
  }
}

bool row_block(const ConvArgs& a, void* memory, int64_t index) {
  RowScratch s;
  carve_rows(a, reinterpret_cast<uintptr_t>(memory), &s);
  const int64_t first = index * kBlockRows, rows = min64(kBlockRows, a.outputs - first);
  if (!read_table(a, s, first, rows)) return false;
  for (int64_t channel = 0; channel < a.out_channels; channel += 16) {
    repack(a, channel, s.weight);
    a.channels == 16 ? accumulate_rows<16>(a, s, first, rows)
                     : accumulate_rows<32>(a, s, first, rows);
    Int8Traits::finish(a, s.acc, 16, nullptr, rows, channel, first * a.out_channels + channel, 16);
  }
  return true;
}

static_assert(1024 / 16 <= kChunkChannels, "repack() expects one chunk");

bool by_rows(const ConvArgs& a) {
  return a.split == nullptr && (a.channels == 16 || a.channels == 32) &&
         a.channels * a.out_channels <= 1024 &&
         a.out_channels > 0 && a.out_channels % 16 == 0 && a.taps > 0 && a.taps <= kMostRowTaps;
}

int64_t int8_scratch_bytes(const ConvArgs& a) {
  RowScratch s;
  return by_rows(a) ? carve_rows(a, 0, &s) : scratch_bytes<Int8Traits>(a);
}

bool int8_block(const ConvArgs& a, void* memory, int64_t index) {
  return by_rows(a) ? row_block(a, memory, index) : block<Int8Traits>(a, memory, index);
}
