// The epilogue of the int8 convolution.
//
// Included by conv_body.h.

// The int8 epilogue (D10) of one vector of channels, each operation rounded on its own.
// F: the float operations of the ISA; sum(r): the exact sums of row r as floats.
template <class F, bool BIAS, bool RESIDUAL, bool RELU, class Sum>
inline void finish_rows(const ConvArgs& a, const Sum& sum, int64_t rows, int64_t channel,
                        int64_t at, int64_t count) {
  const auto scale = F::load(a.scale + channel);
  const auto bias = BIAS ? F::load(a.bias + channel) : scale;
  const auto residual_scale = F::set(a.residual_scale);
  // Copies: bytes that are stored could be those of `a`, as far as the compiler knows.
  const OutType out_type = a.out_type;
  void* const out = a.out;
  const int8_t* const residual = a.residual;
  const int64_t stride = a.out_channels;
  for (int64_t r = 0; r < rows; ++r, at += stride) {
    auto t = F::mul(sum(r), scale);
    if (BIAS) t = F::add(t, bias);
    if (RESIDUAL) t = F::add(t, F::mul(residual_scale, F::load_int8(residual + at, count)));
    if (RELU) t = F::relu(t);
    if (out_type == kOutInt8) {
      F::store_int8(static_cast<int8_t*>(out) + at, t, count);
    } else if (out_type == kOutHalf) {
      F::store_half(static_cast<uint16_t*>(out) + at, t, count);
    } else {
      F::store(static_cast<float*>(out) + at, t, count);
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
