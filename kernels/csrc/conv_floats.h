// The epilogue on several vectors of channels at once: bytes are packed from all of them together,
// which takes half of the instructions that one vector by itself takes.
//
// Included by the paths that have vectors, after conv_body.h.

// N vectors. One: the float operations of one vector, and pack, which stores bytes of N of them.
template <class One, int N>
struct Floats {
  static constexpr int64_t kLanes = One::kLanes * N;
  struct V {
    typename One::V of[N];
  };
  template <class F>
  static inline __attribute__((always_inline)) V each(const F& f) {
    V v;
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) v.of[i] = f(i);
    return v;
  }
  static V load(const float* p) {
    return each([=](int i) { return One::load(p + i * One::kLanes); });
  }
  static V set(float x) {
    return each([=](int) { return One::set(x); });
  }
  static V add(const V& a, const V& b) {
    return each([&](int i) { return One::add(a.of[i], b.of[i]); });
  }
  static V mul(const V& a, const V& b) {
    return each([&](int i) { return One::mul(a.of[i], b.of[i]); });
  }
  static V relu(const V& a) {
    return each([&](int i) { return One::relu(a.of[i]); });
  }
  // The loads and stores are of `count` channels: of all, or, where N is 1, of fewer.
  static constexpr int64_t of_one(int64_t count) { return N > 1 ? One::kLanes : count; }
  static V load_int8(const int8_t* p, int64_t count) {
    return each([=](int i) { return One::load_int8(p + i * One::kLanes, of_one(count)); });
  }
  static void store_int8(int8_t* p, const V& t, int64_t count) {
    if constexpr (N == 1) {
      One::store_int8(p, t.of[0], count);
    } else {
      One::template pack<N>(p, t.of);
    }
  }
  static void store_half(uint16_t* p, const V& t, int64_t count) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) One::store_half(p + i * One::kLanes, t.of[i], of_one(count));
  }
  static void store(float* p, const V& t, int64_t count) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) One::store(p + i * One::kLanes, t.of[i], of_one(count));
  }
};

// The epilogue of up to four vectors of channels; sum(row, vector) are their exact sums as floats.
template <class One, class Sum>
inline void finish_vectors(const ConvArgs& a, const Sum& sum, int64_t rows, int64_t channel,
                           int64_t at, int64_t count) {
  const auto vectors = [&](auto number, int64_t v) {
    using F = Floats<One, decltype(number)::value>;
    const auto sums = [&](int64_t r) {
      return F::each([&](int i) { return sum(r, v + i); });
    };
    const int64_t done = v * One::kLanes;
    finish_int8<F>(a, sums, rows, channel + done, at + done, min64(F::kLanes, count - done));
  };
  if (count == 4 * One::kLanes) return vectors(std::integral_constant<int, 4>{}, 0);
  int64_t v = 0;
  for (; (v + 2) * One::kLanes <= count; v += 2) vectors(std::integral_constant<int, 2>{}, v);
  for (; v * One::kLanes < count; ++v) vectors(std::integral_constant<int, 1>{}, v);
}

// The epilogue of one vector of a float convolution.
template <class One>
inline void finish_floats(const ConvArgs& a, const float* sums, int64_t pitch, int64_t rows,
                          int64_t channel, int64_t at, int64_t count) {
  const auto bias = a.bias == nullptr ? One::set(0.0f) : One::load(a.bias + channel);
  for (int64_t r = 0; r < rows; ++r, at += a.out_channels) {
    const auto sum = One::add(One::load(sums + r * pitch), bias);
    One::store(static_cast<float*>(a.out) + at, sum, count);
  }
}
