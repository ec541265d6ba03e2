"""Dense int8 layers as ops, on the sparse kernel: `fquant::linear_int8`, `fquant::conv_int8`, ...

A dense convolution is a sparse one in which every cell is active: its kernel map follows from sizes
alone, and a linear layer is the case of one tap. So the arithmetic is that of
`fquant_kernels.sparse_conv_int8` (exact int32 sums, then the float32 epilogue), and so is the speed.

oneDNN's int8 layers (`torch.ops.onednn.qlinear_pointwise`) do not compute these sums on CPUs without
VNNI: pairs of products saturate at int16. Of 2,112 sums of 256 full-range products 0.4 % were right on
an AVX2 machine. `torch._int_mm` is exact, and ran there at 3 GOP/s where this kernel ran at 140 to 226.

Unsigned integers are shifted: the kernel reads and writes `q - 128`. `zero` is the integer that means
0.0, after that shift; cells beyond the edge hold it. The sums are of the shifted integers as they are:
`- zero * sum(weights)` is left to the bias, but in grouped layers, which subtract it from x.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import fquant_kernels
from fquant.affine import dequantize, quantize
from fquant.graph.dense_maps import (
    dense_neighbors,
    output_size,
    transposed_neighbors,
    transposed_output_size,
)
from fquant.graph.qdq_ops import format_from_text
from fquant.packing import PackedTensor
from fquant_kernels.conv_int8.reference import requantize
from fquant_kernels.library import define_composite_op

# Sums of this many int8 products are whole numbers below 2^24, exact in float32 in any order.
EXACT_IN_FLOAT32 = 2**24 // 2**14

_EPILOGUE = (
    "Tensor scale, Tensor? bias, Tensor? residual, Tensor? residual_scale, bool relu, "
    "ScalarType out_dtype"
)
_X = "Tensor x, int zero, Tensor weight, int[] weight_shape, str isa"
SHIFT = 128


def to_signed(q: Tensor) -> Tensor:
    """Returns int8 as it is, and uint8 less 128 as int8."""
    return q if q.dtype == torch.int8 else q.bitwise_xor(SHIFT).view(torch.int8)


def from_signed(q: Tensor) -> Tensor:
    """Returns int8 plus 128 as uint8."""
    return q.bitwise_xor(-SHIFT).view(torch.uint8)


def _by_rows(
    rows: Tensor,
    zero: int,
    neighbors: Tensor,
    weight: Tensor,
    weight_shape: Sequence[int],
    isa: str,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    relu: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """The convolution of rows, by a weight as it is (isa "") or one packed for an instruction set."""
    shape = [weight_shape[0], math.prod(weight_shape[1:-1]), weight_shape[-1]]
    rows = to_signed(rows)
    if zero != 0:
        count = rows.shape[0]
        rows = torch.cat([rows, rows.new_full((1, shape[2]), zero)])
        neighbors = torch.where(neighbors < 0, count, neighbors)
    added = None if residual is None else to_signed(residual)
    kernel_dtype = torch.int8 if out_dtype == torch.uint8 else out_dtype
    epilogue = (scale, bias, added, residual_scale, relu, kernel_dtype)
    if isa:
        y = fquant_kernels.sparse_conv_int8_packed(rows, weight, shape, isa, neighbors, *epilogue)
    else:
        y = fquant_kernels.sparse_conv_int8(rows, weight.reshape(shape), neighbors, *epilogue)
    return from_signed(y) if out_dtype == torch.uint8 else y


def _linear(
    x: Tensor,
    zero: int,
    weight: Tensor,
    weight_shape: Sequence[int],
    isa: str,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    relu: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    del zero  # no cell is absent
    rows = x.reshape(-1, weight_shape[1])
    neighbors = torch.arange(rows.shape[0], dtype=torch.int32, device=x.device).unsqueeze(0)
    if residual is not None:
        residual = residual.reshape(-1, weight_shape[0])
    shape = [weight_shape[0], 1, weight_shape[1]]
    y = _by_rows(
        rows, 0, neighbors, weight, shape, isa, scale, bias, residual, residual_scale, relu,
        out_dtype,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], weight_shape[0])


def _conv(
    x: Tensor,
    zero: int,
    weight: Tensor,
    weight_shape: Sequence[int],
    isa: str,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    relu: bool,
    out_dtype: torch.dtype,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    kernel = weight_shape[1:-1]
    if groups > 1:
        conv = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
        return _grouped(
            conv, (stride, padding, dilation, groups), x, zero, weight.movedim(-1, 1),
            scale, bias, residual, residual_scale, relu, out_dtype,
        )  # fmt: skip
    size = x.shape[2:]
    neighbors = dense_neighbors(x.shape[0], size, kernel, stride, padding, dilation, x.device)
    out_size = [
        output_size(*axis) for axis in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    y = _by_rows(
        _rows(x), zero, neighbors, weight, weight_shape, isa, scale, bias,
        None if residual is None else _rows(residual), residual_scale, relu, out_dtype,
    )  # fmt: skip
    return y.reshape(x.shape[0], *out_size, weight_shape[0]).movedim(-1, 1)


def _conv_transpose(
    x: Tensor,
    zero: int,
    weight: Tensor,
    weight_shape: Sequence[int],
    isa: str,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    relu: bool,
    out_dtype: torch.dtype,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    if groups > 1:
        conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.ndim - 3]
        # Of a transposed convolution torch counts (groups, inputs of a group), one after the other.
        inputs_first = weight.unflatten(0, (groups, -1)).movedim(-1, 1).flatten(0, 1)
        return _grouped(
            conv, (stride, padding, output_padding, groups, dilation), x, zero, inputs_first,
            scale, bias, residual, residual_scale, relu, out_dtype,
        )  # fmt: skip
    size = x.shape[2:]
    geometry = (weight_shape[1:-1], stride, padding, dilation, output_padding)
    neighbors = transposed_neighbors(x.shape[0], size, *geometry, x.device)
    out_size = [transposed_output_size(*axis) for axis in zip(size, *geometry, strict=True)]
    y = _by_rows(
        _rows(x), zero, neighbors, weight, weight_shape, isa, scale, bias,
        None if residual is None else _rows(residual), residual_scale, relu, out_dtype,
    )  # fmt: skip
    return y.reshape(x.shape[0], *out_size, weight_shape[0]).movedim(-1, 1)


def _add(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    relu: bool,
    scale: Tensor,
    zero_point: Tensor | None,
    format: str,
) -> Tensor:
    """The quantized `(a - a_zero) * a_scale + (b - b_zero) * b_scale`, each operation in float32."""
    first, second = (
        (q.to(torch.float32) - (0 if zero is None else zero)) * step
        for q, step, zero in ((a, a_scale, a_zero), (b, b_scale, b_zero))
    )
    y = first + second
    return quantize(y.clamp(min=0.0) if relu else y, scale, zero_point, format_from_text(format)).q


def _dequantize_packed(
    packed: Tensor, length: int, scale: Tensor, format: str, dtype: torch.dtype
) -> Tensor:
    """The values of codes of up to 4 bits, two or four to a byte (`fquant.PackedTensor`)."""
    spec = format_from_text(format)
    return dequantize(PackedTensor(packed, scale, spec=spec, length=length, dtype=dtype))


def _rows(x: Tensor) -> Tensor:
    """(batch, channels, *size) as rows of channels: no copy for a tensor in channels-last order."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _grouped(
    conv: Callable[..., Tensor],
    geometry: Sequence[object],
    x: Tensor,
    zero: int,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    relu: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """A layer in groups, in floats that hold whole numbers: the same sums, exactly."""
    products = math.prod(weight.shape[1:]) * (1 if zero == 0 else 2)
    wide = torch.float32 if products <= EXACT_IN_FLOAT32 else torch.float64
    sums = conv(to_signed(x).to(wide) - zero, weight.to(wide), None, *geometry)
    shape = [-1] + [1] * (x.ndim - 2)
    bias = None if bias is None else bias.view(shape)
    added = None if residual is None else to_signed(residual)
    kernel_dtype = torch.int8 if out_dtype == torch.uint8 else out_dtype
    y = requantize(sums, scale.view(shape), bias, added, residual_scale, relu, kernel_dtype)
    return from_signed(y) if out_dtype == torch.uint8 else y


def _max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The largest integer of each window, tap by tap: torch's own refuses int8 maps beyond 127 cells."""
    lowest = torch.iinfo(x.dtype).min
    sides = [side for p in reversed(padding) for side in (p, p)]
    padded = F.pad(x, sides, value=lowest) if any(padding) else x
    result = None
    for taps in itertools.product(*map(range, kernel)):
        part = padded
        for axis, tap in enumerate(taps):
            size = padded.shape[axis + 2]
            count = output_size(size, kernel[axis], stride[axis], 0, dilation[axis])
            first = tap * dilation[axis]
            last = first + (count - 1) * stride[axis] + 1
            part = part[(slice(None),) * (axis + 2) + (slice(first, last, stride[axis]),)]
        result = part if result is None else torch.maximum(result, part)
    return padded.clone() if result is None or result is x else result


linear_int8 = define_composite_op(f"linear_int8({_X}, {_EPILOGUE}) -> Tensor", _linear)
conv_int8 = define_composite_op(
    f"conv_int8({_X}, {_EPILOGUE}, int[] stride, int[] padding, int[] dilation, "
    "int groups) -> Tensor",
    _conv,
)
conv_transpose_int8 = define_composite_op(
    f"conv_transpose_int8({_X}, {_EPILOGUE}, int[] stride, int[] padding, "
    "int[] dilation, int[] output_padding, int groups) -> Tensor",
    _conv_transpose,
)
add_int8 = define_composite_op(
    "add_int8(Tensor a, Tensor a_scale, Tensor? a_zero, Tensor b, Tensor b_scale, Tensor? b_zero, "
    "bool relu, Tensor scale, Tensor? zero_point, str format) -> Tensor",
    _add,
)
dequantize_packed = define_composite_op(
    "dequantize_packed(Tensor packed, int length, Tensor scale, str format, ScalarType dtype) "
    "-> Tensor",
    _dequantize_packed,
)
max_pool_int8 = define_composite_op(
    "max_pool_int8(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor",
    _max_pool,
)
