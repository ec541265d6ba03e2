"""The op `fquant::sparse_conv_int8_packed`: weights in one instruction set's order, ahead of time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fquant_kernels import native
from fquant_kernels.checks import check_epilogue, require_tensor
from fquant_kernels.conv_int8 import cpu
from fquant_kernels.library import define_inference_op

_NAME = "fquant::sparse_conv_int8_packed"


def check_args(
    features: Tensor,
    packed: Tensor,
    weight_shape: Sequence[int],
    isa: str,
    neighbors: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    relu: bool = False,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Checks dtypes, shapes and devices; reads no values."""
    num_channels, num_taps = weight_shape[0], weight_shape[1]
    require_tensor(_NAME, "features", features, torch.int8, ("N", weight_shape[2]), features)
    size = native.library().fquant_packed_bytes(native.choose_isa(isa), 0, *weight_shape)
    require_tensor(_NAME, "packed", packed, torch.uint8, (size,), features)
    require_tensor(_NAME, "neighbors", neighbors, torch.int32, (num_taps, "M"), features)
    check_epilogue(
        _NAME, features, neighbors.shape[1], num_channels, scale, bias, residual, residual_scale
    )
    if features.device.type != "cpu":
        raise ValueError(f"{_NAME}: features must be on the CPU, got {features.device}.")


def fake(
    features: Tensor,
    packed: Tensor,
    weight_shape: Sequence[int],
    isa: str,
    neighbors: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    relu: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns an empty result."""
    out_shape = (neighbors.shape[1], weight_shape[0])
    return features.new_empty(out_shape, dtype=torch.int8 if out_dtype is None else out_dtype)


_op = define_inference_op(
    "sparse_conv_int8_packed(Tensor features, Tensor packed, int[] weight_shape, str isa, "
    "Tensor neighbors, Tensor scale, Tensor? bias=None, Tensor? residual=None, "
    "Tensor? residual_scale=None, bool relu=False, ScalarType? out_dtype=None) -> Tensor",
    check_args,
    cpu.convolve_packed,
    fake,
    instead="It is for inference on one kind of CPU.",
)


def sparse_conv_int8_packed(
    features: Tensor,
    packed: Tensor,
    weight_shape: Sequence[int],
    isa: str,
    neighbors: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    relu: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns `sparse_conv_int8(features, weight, neighbors, ...)`, bit for bit, on the CPU.

    The weight's rearrangement, which takes longer than the products where there are few rows, was done
    ahead of time; the result of that is for one instruction set.

    Args:
        features: `(N, Cin)` int8; this and all after isa as for `sparse_conv_int8`.
        packed: `pack_weight_for(weight, isa)`.
        weight_shape: `(Cout, K, Cin)` of that weight.
        isa: the instruction set it was packed for.
        neighbors: `(K, M)` int32.
        scale: `(Cout,)` float32.
        bias: `(Cout,)` float32.
        residual: `(M, Cout)` int8.
        residual_scale: 0-d float32.
        relu: whether to clamp at 0 before rounding.
        out_dtype: int8, float16 or float32.

    Raises:
        RuntimeError: this processor does not run isa; or a derivative is asked for.

    Example:
        >>> features = torch.tensor([[10], [20]], dtype=torch.int8)
        >>> weight = torch.tensor([[[1], [2]]], dtype=torch.int8)
        >>> neighbors = torch.tensor([[-1, 0], [0, 1]], dtype=torch.int32)
        >>> packed, isa = pack_weight_for(weight)
        >>> sparse_conv_int8_packed(
        ...     features, packed, weight.shape, isa, neighbors, torch.tensor([0.25])
        ... ).T
        tensor([[ 5, 12]], dtype=torch.int8)
    """
    return _op(
        features,
        packed,
        list(weight_shape),
        isa,
        neighbors,
        scale,
        bias,
        residual,
        residual_scale,
        relu,
        out_dtype,
    )


def pack_weight_for(weight: Tensor, isa: str | None = None) -> tuple[Tensor, str]:
    """Returns a weight in the order one instruction set reads it, and the name of that set.

    Args:
        weight: `(Cout, K, Cin)` int8.
        isa: one of `native.ISAS`; None for the best this processor has.
    """
    name = native.chosen_isa(isa)
    return cpu.pack_weight(weight, name), name
