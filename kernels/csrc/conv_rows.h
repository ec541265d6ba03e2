// 16 or 32 channels to at most 16, AVX-512: one output row after the other, its sums in registers.
//
// Included by conv_avx512.cpp inside its anonymous namespace. With so few channels the block loop
// of conv_body.h spends most of its time on lists and on loading and storing sums. Here the taps of
// a row are bits of a mask, and the compensation is one more sum, so no pass over the inputs
// computes row sums. Against the block loop, in one process, memory cold, kitti / nuscenes / waymo
// (Zen 5, ns per output row): 16 to 16 channels 19.4 / 23.3 / 21.2 before, 15.5 / 19.9 / 17.8 here;
// 32 to 16 channels 25.3 / 30.1 / 26.4 and 19.7 / 24.6 / 21.5. Not used where it gains nothing:
// 16 to 32 channels 22.4 / 28.7 / 25.4 and 21.6 / 27.6 / 24.9, 32 to 32 channels 28.5 / 37.3 / 33.3
// and 29.2 / 39.7 / 34.5: weights are loaded for every pair here, for every fourth there.

constexpr int64_t kPieceRows = 128;   // 64: the same within 3 %; 256: 4 % slower
constexpr int64_t kMostRowTaps = 31;  // so that counts of taps, 0 to 31, are bits of a mask, too

struct RowScratch {
  int32_t* acc;            // (kPieceRows, 16)
  int32_t* entry;          // (taps, kPieceRows): the piece of the table
  int32_t* list;           // its present entries
  uint32_t* present;       // the taps each row has, as bits
  uint32_t* compensation;  // zeros: the sums are compensated already
  uint8_t* weight;         // see repack()
  uint8_t* order;          // rows by their number of taps
};

int64_t carve_rows(const ConvArgs& a, uintptr_t base, RowScratch* s) {
  int64_t used = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + used);
    used += aligned(count * static_cast<int64_t>(sizeof(*pointer)));
  };
  take(s->acc, kPieceRows * 16);
  take(s->entry, a.taps * kPieceRows);
  take(s->list, a.taps * kPieceRows + 16);  // whole vectors are stored past the end
  take(s->present, kPieceRows);
  take(s->compensation, kPieceRows);
  take(s->weight, a.taps * a.channels * 16);
  take(s->order, kPieceRows + 16);
  return used;
}

// Copies the piece of the table and marks what is present; false: an entry is not below `inputs`.
bool read_table(const ConvArgs& a, const RowScratch& s, int64_t first, int64_t rows) {
  const int64_t most = INT32_MAX;
  const __m512i limit = _mm512_set1_epi32(static_cast<int32_t>(min64(a.inputs, most)));
  const __m512i none = _mm512_set1_epi32(-1), sign = _mm512_set1_epi32(INT32_MIN);
  const __m128i unused = _mm_cvtsi32_si128(static_cast<int>(32 - a.taps));
  __m512i largest = none;
  int32_t* list = s.list;
  for (int64_t r = 0; r < rows; r += 16) {
    const __mmask16 live = first_lanes(rows - r);
    const int32_t* table = a.neighbors + first + r;
    int32_t* entries = s.entry + r;
    __m512i absent = _mm512_setzero_si512();  // a bit comes in at the top and moves down
    for (int64_t k = 0; k < a.taps; ++k, table += a.outputs, entries += kPieceRows) {
      _mm_prefetch(reinterpret_cast<const char*>(table) + kBlockRows * 4, _MM_HINT_T0);
      const __m512i entry = _mm512_mask_loadu_epi32(none, live, table);
      _mm512_store_si512(entries, entry);
      largest = _mm512_max_epi32(largest, entry);
      const __mmask16 present = _mm512_cmpgt_epi32_mask(entry, none);
      _mm512_storeu_si512(list, _mm512_maskz_compress_epi32(present, entry));
      list += __builtin_popcount(present);
      // absent >> 1 | (entry & sign)
      absent = _mm512_ternarylogic_epi32(_mm512_srli_epi32(absent, 1), entry, sign, 0xf8);
    }
    absent = _mm512_srl_epi32(_mm512_xor_si512(absent, none), unused);
    _mm512_store_si512(s.present + r, absent);
  }
  if (_mm512_cmpge_epi32_mask(largest, limit) != 0) return false;
  // Without this and its list: 30 to 39 % slower.
  const char* features = static_cast<const char*>(a.features);
  for (const int32_t* i = s.list; i < list; ++i) __builtin_prefetch(features + *i * a.channels);
  return true;
}

// Numbers of set bits, per lane.
inline __m512i count_bits(__m512i x) {
  const __m512i counts = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i bytes = _mm512_add_epi8(
      _mm512_shuffle_epi8(counts, _mm512_and_si512(x, low)),
      _mm512_shuffle_epi8(counts, _mm512_and_si512(_mm512_srli_epi32(x, 4), low)));
  return _mm512_dpbusd_epi32(_mm512_setzero_si512(), bytes, _mm512_set1_epi8(1));
}

// Orders rows by their number of taps: the loop over the taps then ends where the processor expects
// it to. In table order: 10 to 14 % slower.
void sort_rows(const RowScratch& s, int64_t rows) {
  constexpr int kVectors = kPieceRows / 16;
  const __m512i ids = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i count[kVectors];
  __m512i seen = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const __mmask16 live = v * 16 < rows ? first_lanes(rows - v * 16) : 0;
    const __m512i present = _mm512_maskz_loadu_epi32(live, s.present + v * 16);
    count[v] = _mm512_mask_blend_epi32(live, _mm512_set1_epi32(-1), count_bits(present));
    const __m512i bit = _mm512_sllv_epi32(_mm512_set1_epi32(1), count[v]);
    seen = _mm512_mask_or_epi32(seen, live, seen, bit);
  }
  uint8_t* order = s.order;
  uint32_t left = static_cast<uint32_t>(_mm512_reduce_or_epi32(seen));
  for (; left != 0; left = _blsr_u32(left)) {
    const __m512i number = _mm512_set1_epi32(static_cast<int32_t>(_tzcnt_u32(left)));
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 same = _mm512_cmpeq_epi32_mask(count[v], number);
      const __m512i row = _mm512_add_epi32(ids, _mm512_set1_epi32(v * 16));
      const __m128i kept = _mm512_cvtepi32_epi8(_mm512_maskz_compress_epi32(same, row));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(order), kept);
      order += __builtin_popcount(same);
    }
  }
}

// Rows become columns, in each 128-bit block of four vectors.
inline void transpose(__m512i* x) {
  const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
  const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm512_unpacklo_epi64(a, c);
  x[1] = _mm512_unpackhi_epi64(a, c);
  x[2] = _mm512_unpacklo_epi64(b, d);
  x[3] = _mm512_unpackhi_epi64(b, d);
}

// The weights as [tap][16 inputs][output % 4][output / 4][16]: one load of 16 inputs into every
// 128-bit block then serves 16 outputs. Four loads of 4 inputs each: 4 % slower.
void repack(const ConvArgs& a, uint8_t* to) {
  const uint8_t* from = static_cast<const uint8_t*>(a.packed);
  for (int64_t i = 0; i < a.taps * a.channels / 16; ++i, from += 256, to += 256) {
    __m512i w[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) w[j] = _mm512_loadu_si512(from + j * 64);
    transpose(w);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_store_si512(to + j * 64, w[j]);
  }
}

// Two rows at a time, their instructions mixed, gain nothing: the processor does that by itself.
template <int CHANNELS>
void accumulate_rows(const ConvArgs& a, const RowScratch& s, int64_t rows) {
  const int8_t* features = static_cast<const int8_t*>(a.features);
  const __m512i half = _mm512_set1_epi8(-128);  // 128, unsigned
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t r = s.order[i];
    __m512i less = _mm512_setzero_si512();
    __m512i sum[4] = {less, less, less, less};
    for (uint32_t left = s.present[r]; left != 0; left = _blsr_u32(left)) {
      const int64_t k = _tzcnt_u32(left);
      const int8_t* x = features + static_cast<int64_t>(s.entry[k * kPieceRows + r]) * CHANNELS;
      const uint8_t* w = s.weight + k * (CHANNELS * 16);
#pragma GCC unroll 2
      for (int c = 0; c < CHANNELS; c += 16) {
        const __m512i b = _mm512_broadcast_i32x4(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + c)));
        less = _mm512_dpbusd_epi32(less, half, b);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          sum[j] = _mm512_dpbusd_epi32(sum[j], _mm512_load_si512(w + c * 16 + j * 64), b);
        }
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = _mm512_sub_epi32(sum[j], less);
    transpose(sum);
    _mm512_store_si512(s.acc + r * 16, _mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]),
                                                        _mm512_add_epi32(sum[2], sum[3])));
  }
}

template <int CHANNELS>
bool row_block(const ConvArgs& a, void* memory, int64_t block_index) {
  RowScratch s;
  carve_rows(a, reinterpret_cast<uintptr_t>(memory), &s);
  repack(a, s.weight);
  __builtin_memset(s.compensation, 0, kPieceRows * sizeof(uint32_t));
  const int64_t end = min64((block_index + 1) * kBlockRows, a.outputs);
  for (int64_t first = block_index * kBlockRows; first < end; first += kPieceRows) {
    const int64_t rows = min64(kPieceRows, end - first);
    if (!read_table(a, s, first, rows)) return false;
    sort_rows(s, rows);
    accumulate_rows<CHANNELS>(a, s, rows);
    Int8Traits::finish(a, s.acc, 16, s.compensation, rows, 0, first * a.out_channels,
                       a.out_channels);
  }
  return true;
}

bool by_rows(const ConvArgs& a) {
  return (a.channels == 16 || a.channels == 32) && a.out_channels > 0 && a.out_channels <= 16 &&
         a.taps > 0 && a.taps <= kMostRowTaps;
}

bool needs_row_sums(const ConvArgs& a) { return !by_rows(a); }

int64_t int8_scratch_bytes(const ConvArgs& a) {
  RowScratch s;
  return by_rows(a) ? carve_rows(a, 0, &s) : scratch_bytes<Int8Traits>(a);
}

bool int8_block(const ConvArgs& a, void* memory, int64_t index) {
  if (!by_rows(a)) return block<Int8Traits>(a, memory, index);
  return a.channels == 16 ? row_block<16>(a, memory, index) : row_block<32>(a, memory, index);
}
