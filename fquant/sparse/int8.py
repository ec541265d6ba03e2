"""int8 sparse convolution on records, over `fquant_kernels.sparse_conv_int8`."""

from typing import Any

import torch
from torch import Tensor

import fquant_kernels
from fquant.records import QTensor
from fquant.sparse.conv import check_map, check_weight_shape, outputs
from fquant.sparse.kernel_map import KernelMap
from fquant.sparse.tensor import SparseTensor
from fquant.spec import QuantSpec

INT8 = QuantSpec()


def sparse_conv_int8(
    x: SparseTensor,
    weight: QTensor,
    bias: Tensor | None = None,
    *,
    kernel_map: KernelMap,
    output_scale: Tensor | None = None,
    residual: SparseTensor | None = None,
    relu: bool = False,
) -> SparseTensor:
    """Returns the quantized convolution, residual and ReLU in one pass over int8 integers.

    In real values it is `relu(sparse_conv(x, weight, bias) + residual)`, quantized with
    `output_scale`. The integers are exactly those of `fquant_kernels.sparse_conv_int8` with

        scale[c] = s_x * s_w[c] / s_y,    bias[c] / s_y,    residual_scale = s_r / s_y

    in float32, in this order, `s_y = output_scale`. No derivative: asking for one raises.

    Args:
        x: int8 features `(N, Cin)`, one scale for all, no zero point.
        weight: int8 `(Cout, *kernel_size, Cin)`, scale per tensor or of shape `(Cout, 1, ..., 1)`.
        bias: `(Cout,)` float32, in real units.
        kernel_map: `subm_map`, `conv_map` or `transpose_map`.
        output_scale: 0-d float32, the step of the result; None for float32 features, for a last
            layer.
        residual: int8 features at the output cells, added before ReLU; one scale, no zero point.
        relu: whether negative sums become 0.

    Returns:
        A SparseTensor at the map's output cells, with QTensor features, or float32 ones without
        `output_scale`.

    Raises:
        TypeError: x, weight or residual is not signed 8-bit, or has a zero point.
        ValueError: a shape or scale does not fit.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 0.5, 1.0]]]))
        >>> kernel_map = fquant.sparse.subm_map(x, 1)
        >>> weight = fquant.quantize(torch.full((1, 1, 1), 2.0), scale=2 / 127)
        >>> quantized = fquant.quantize(x, scale=1 / 127)
        >>> step = torch.tensor(0.02)
        >>> sparse_conv_int8(
        ...     quantized, weight, kernel_map=kernel_map, output_scale=step
        ... ).features.q.T
        tensor([[ 50, 100]], dtype=torch.int8)

    References:
        The epilogue: see `fquant_kernels.sparse_conv_int8`.
    """
    features = _int8_features("x", x)
    _require_int8("weight", weight)
    check_weight_shape("sparse_conv_int8", x, tuple(weight.shape))
    check_map("sparse_conv_int8", x, weight.shape, kernel_map)
    num_outputs = weight.shape[0]
    per_channel = (num_outputs, *[1] * (len(weight.shape) - 1))
    if weight.scale.numel() != 1 and tuple(weight.scale.shape) != per_channel:
        raise ValueError(
            "sparse_conv_int8: weight.scale must have one step, or one per output channel in shape "
            f"{per_channel}, got {tuple(weight.scale.shape)}."
        )
    step = features.scale.reshape(()) * weight.scale.reshape(-1)
    offset = bias
    if output_scale is not None:
        step = step / output_scale
        offset = None if bias is None else bias / output_scale
    added, added_scale = None, None
    if residual is not None:
        other = _int8_features("residual", residual)
        added, added_scale = other.q, other.scale.reshape(())
        if output_scale is not None:
            added_scale = added_scale / output_scale
    q, table = weight.q.flatten(1, -2), kernel_map.neighbors
    epilogue: tuple[Any, ...] = (
        step.expand(num_outputs),
        offset,
        added,
        added_scale,
        relu,
        torch.float32 if output_scale is None else torch.int8,
    )
    if kernel_map.pairs is None:
        y = fquant_kernels.sparse_conv_int8(features.q, q, table, *epilogue)
    else:
        pairs = fquant_kernels.PairRulebook(*kernel_map.pairs)
        y = fquant_kernels.sparse_conv_int8_pairs(features.q, q, table, pairs, *epilogue)
    if output_scale is None:
        return outputs(kernel_map, y)
    return outputs(kernel_map, QTensor(y, output_scale, spec=INT8, dtype=features.dtype))


def _int8_features(argument: str, x: SparseTensor) -> QTensor:
    if not isinstance(x, SparseTensor):
        raise TypeError(
            f"sparse_conv_int8: {argument} must be a SparseTensor, got {type(x).__name__}."
        )
    _require_int8(f"{argument}.features", x.features)
    assert isinstance(x.features, QTensor)
    if x.features.scale.numel() != 1:
        raise ValueError(
            f"sparse_conv_int8: {argument}.features must have one scale for all, "
            f"got a scale of shape {tuple(x.features.scale.shape)}."
        )
    return x.features


def _require_int8(argument: str, value: Tensor | QTensor) -> None:
    if not isinstance(value, QTensor):
        raise TypeError(
            f"sparse_conv_int8: {argument} must be a QTensor, got {type(value).__name__}. "
            "fquant.quantize makes one."
        )
    if value.q.dtype != torch.int8 or value.zero_point is not None:
        got = value.q.dtype if value.zero_point is None else "a zero point"
        raise TypeError(
            f"sparse_conv_int8: {argument} must be signed 8-bit without a zero point, got {got}."
        )
