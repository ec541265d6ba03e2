// What a path offers to the driver besides its block loop.
//
// Included by conv_body.h.

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
  auto b = T::broadcast(x);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) {
      // A product that does not depend on the sum would be computed once, before the loop.
      if constexpr (T::kStage) __asm__ volatile("" : "+x"(b));
      sum[i] = T::dot(sum[i], w, b);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) {
    T::store(lanes, sum[i]);
    for (int64_t lane = 0; lane < T::kLanes; ++lane) *sink += static_cast<int32_t>(lanes[lane]);
  }
  return rounds * kSums * T::kLanes * T::kGroup * 2;
}

inline bool always(const ConvArgs&) { return true; }

// The path, with another one for inputs that are not negative.
constexpr ConvPath with_nonnegative(ConvPath path, const ConvPath& nonnegative,
                                    bool (*gains)(const ConvArgs&),
                                    bool (*is_nonnegative)(const int8_t*, int64_t)) {
  path.nonnegative = &nonnegative;
  path.gains = gains;
  path.is_nonnegative = is_nonnegative;
  return path;
}

template <class T>
constexpr ConvPath make_path(void (*row_sums)(const ConvArgs&, int64_t, int64_t)) {
  return ConvPath{{T::kLanes, T::kGroup, T::kTileVectors, sizeof(typename T::Weight),
                   T::kSegments},
                  scratch_bytes<T>,
                  row_sums,
                  block<T>,
                  peak<T>,
                  list_pairs,
                  nullptr,
                  nullptr,
                  nullptr};
}
