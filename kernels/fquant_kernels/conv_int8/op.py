"""The op `fquant::sparse_conv_int8`: argument checks, fake impl, registration."""

import torch
from torch import Tensor

from fquant_kernels import native
from fquant_kernels.checks import check_epilogue, require_tensor
from fquant_kernels.conv_int8 import cpu, reference
from fquant_kernels.library import define_inference_op
from fquant_kernels.registry import offer
from fquant_kernels.triton_support import register_triton

_NAME = "fquant::sparse_conv_int8"
# |int8 * int8| <= 2^14, so K * Cin products fit int32 while K * Cin <= (2^31 - 1) / 2^14.
MAX_PRODUCTS = 131_071
OUT_DTYPES = (torch.int8, torch.float16, torch.float32)


def check_args(
    features: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    relu: bool = False,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Checks dtypes, shapes and devices; reads no values."""
    require_tensor(_NAME, "features", features, torch.int8, ("N", "Cin"), features)
    expected = ("Cout", "K", features.shape[1])
    require_tensor(_NAME, "weight", weight, torch.int8, expected, features)
    num_out_channels, num_taps, num_channels = weight.shape
    require_tensor(_NAME, "neighbors", neighbors, torch.int32, (num_taps, "M"), features)
    num_outputs = neighbors.shape[1]
    check_epilogue(
        _NAME, features, num_outputs, num_out_channels, scale, bias, residual, residual_scale
    )
    if num_taps * num_channels > MAX_PRODUCTS:
        raise ValueError(
            f"{_NAME}: K * Cin must be at most {MAX_PRODUCTS}, so that int32 sums "
            f"cannot overflow, got {num_taps} * {num_channels} = {num_taps * num_channels}."
        )
    if out_dtype is not None and out_dtype not in OUT_DTYPES:
        raise TypeError(f"{_NAME}: out_dtype must be one of {OUT_DTYPES}, got {out_dtype}.")


def fake(
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
    """Returns an empty result."""
    out_shape = (neighbors.shape[1], weight.shape[0])
    return features.new_empty(out_shape, dtype=torch.int8 if out_dtype is None else out_dtype)


_op = define_inference_op(
    "sparse_conv_int8(Tensor features, Tensor weight, Tensor neighbors, Tensor scale, "
    "Tensor? bias=None, Tensor? residual=None, Tensor? residual_scale=None, bool relu=False, "
    "ScalarType? out_dtype=None) -> Tensor",
    check_args,
    reference.sparse_conv_int8,
    fake,
    instead="Train with fake quantization (fquant.fake_quantize around fquant.sparse.sparse_conv).",
)
offer(
    _op,
    "cpu",
    "cpp",
    check_args,
    cpu.sparse_conv_int8,
    native.why_unavailable,
    native.describe_isas(),
)
register_triton(_op, check_args, "fquant_kernels.conv_int8.cuda_triton", reference.sparse_conv_int8)


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
    """Returns the int8 sparse convolution with its epilogue, `(M, Cout)` of `out_dtype`.

    `acc[m, o] = sum_k sum_c features[neighbors[k, m], c] * weight[o, k, c]` exactly in int32, then,
    in float32 with every operation rounded on its own,

        t = float(acc) * scale[o];  t = t + bias[o];  t = t + residual_scale * float(residual)
        t = max(t, 0) if relu;      y = saturate(round_half_even(t), -128, 127)

    With real values `x = s_x * q_x` and so on, `scale[o] = s_x * s_w[o] / s_y`,
    `bias[o] = b[o] / s_y` and `residual_scale = s_r / s_y`, `s_y * y` is the quantized convolution.

    Args:
        features: `(N, Cin)` int8, the input rows; N may be 0.
        weight: `(Cout, K, Cin)` int8: KRSC with the kernel axes flattened.
        neighbors: `(K, M)` int32 kernel map (`kernel_neighbors`), -1 for absent, below N.
        scale: `(Cout,)` float32, finite.
        bias: `(Cout,)` float32, in output steps.
        residual: `(M, Cout)` int8, added before the activation.
        residual_scale: 0-d float32; given exactly when `residual` is.
        relu: whether to clamp at 0 before rounding.
        out_dtype: int8 (the default), or float16 or float32 for `t` unrounded.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape or device is not as above, or `K * Cin > 131071`.
        IndexError: an entry of neighbors is N or more (checked on CPU only: there it is free).
        RuntimeError: a derivative is asked for.

    Example:
        >>> features = torch.tensor([[10], [20]], dtype=torch.int8)
        >>> weight = torch.tensor([[[1], [2]]], dtype=torch.int8)     # two taps, one channel
        >>> neighbors = torch.tensor([[-1, 0], [0, 1]], dtype=torch.int32)
        >>> sparse_conv_int8(features, weight, neighbors, torch.tensor([0.25])).T
        tensor([[ 5, 12]], dtype=torch.int8)

    References:
        spconv 2.3.8, `quantized/conv.py`; cumm, `gemm/output_op/linear.py`, class Int8Inference.
    """
    return _op(features, weight, neighbors, scale, bias, residual, residual_scale, relu, out_dtype)
