"""The definition of the int8 sparse convolution; every backend matches it bit for bit."""

import torch
from torch import Tensor


def accumulate(features: Tensor, weight: Tensor, neighbors: Tensor) -> Tensor:
    """Returns the exact int32 sums of products, `(M, Cout)`.

        acc[m, o] = sum_k sum_c features[neighbors[k, m], c] * weight[o, k, c]

    Each product of an absent neighbor is 0. Summed in float64, which holds every partial sum
    exactly (they stay below 2^31 by `check_args`), because float64 matmul is fast everywhere.
    """
    num_inputs, num_outputs = features.shape[0], neighbors.shape[1]
    padded = torch.cat([features, features.new_zeros(1, features.shape[1])]).double()
    rows = torch.where(neighbors < 0, num_inputs, neighbors)
    acc = padded.new_zeros(num_outputs, weight.shape[0])
    for k in range(weight.shape[1]):
        acc = acc + padded[rows[k]] @ weight[:, k].double().T
    return acc.to(torch.int32)


def requantize(
    acc: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    relu: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Returns the epilogue of int32 sums, in float32, each operation rounded on its own (no FMA).

        t = float(acc) * scale[c];  t = t + bias[c];  t = t + residual_scale * float(residual)
        t = max(t, 0) if relu;      y = saturate(round_half_even(t), -128, 127)

    The last step only for `out_dtype` int8; a float `out_dtype` gets `t`. This is the arithmetic
    of spconv's int8 kernels (cumm `Int8Inference`), with FMA contraction off.
    """
    t = acc.to(torch.float32) * scale
    if bias is not None:
        t = t + bias
    if residual is not None and residual_scale is not None:
        t = t + residual_scale * residual.to(torch.float32)
    if relu:
        t = t.clamp(min=0.0)
    if out_dtype == torch.int8:
        t = t.round().clamp(-128.0, 127.0)
    return t.to(out_dtype)


def sparse_conv_int8(
    features: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    relu: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns `requantize(accumulate(...), ...)`; shapes as in `op.sparse_conv_int8`."""
    acc = accumulate(features, weight, neighbors)
    out_dtype = torch.int8 if out_dtype is None else out_dtype
    return requantize(acc, scale, bias, residual, residual_scale, relu, out_dtype)
