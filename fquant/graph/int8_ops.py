"""Dense int8 layers as ops, on the sparse kernel: `fquant::linear_int8`, `fquant::conv_int8`, ...

A dense convolution is a sparse one in which every cell is active: its kernel map follows from sizes
alone, and a linear layer is the case of one tap. So the arithmetic is that of
`fquant_kernels.sparse_conv_int8` (exact int32 sums, then the float32 epilogue), and so is the speed.

oneDNN's int8 layers (`torch.ops.onednn.qlinear_pointwise`) do not compute these sums on CPUs without
VNNI: pairs of products saturate at int16. Of 2,112 sums of 256 full-range products 0.4 % were right on
an AVX2 machine. `torch._int_mm` is exact, and ran there at 3 GOP/s where this kernel ran at 140 to 226.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import fquant_kernels
from fquant.affine import dequantize, quantize
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
_WEIGHT = "Tensor weight, int[] weight_shape, str isa"


def dense_neighbors(
    batch: int,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Returns the kernel map of a dense convolution over rows in (batch, *size) order.

    Output cell o reads `o * stride - padding + k * dilation` by tap k; -1 outside.

    Returns:
        `(prod(kernel), batch * prod(output size))` int32.

    Example:
        >>> dense_neighbors(1, [3], [3], [1], [1], [1], torch.device("cpu"))
        tensor([[-1,  0,  1],
                [ 0,  1,  2],
                [ 1,  2, -1]], dtype=torch.int32)
    """
    axes = len(size)

    def along(values: Tensor, axis: int) -> Tensor:
        return values.reshape([-1 if a == axis else 1 for a in range(2 * axes + 1)])

    rows = along(torch.arange(batch, dtype=torch.int32, device=device), axes)
    outside = None
    for axis in range(axes):
        taps = along(torch.arange(kernel[axis], dtype=torch.int32, device=device), axis)
        count = output_size(size[axis], kernel[axis], stride[axis], padding[axis], dilation[axis])
        cells = along(torch.arange(count, dtype=torch.int32, device=device), axes + 1 + axis)
        read = cells * stride[axis] - padding[axis] + taps * dilation[axis]
        rows = rows * size[axis] + read
        if padding[axis]:
            beyond = (read < 0) | (read >= size[axis])
            outside = beyond if outside is None else outside | beyond
    rows = rows if outside is None else torch.where(outside, -1, rows)
    return rows.reshape(math.prod(kernel), -1).to(torch.int32)


def transposed_neighbors(
    batch: int,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Returns the kernel map of a dense transposed convolution, as `dense_neighbors`.

    Output cell o reads `(o + padding - k * dilation) / stride` by tap k where that is a cell.

    Example:
        >>> transposed_neighbors(1, [2], [2], [2], [0], [1], [0], torch.device("cpu"))
        tensor([[ 0, -1,  1, -1],
                [-1,  0, -1,  1]], dtype=torch.int32)
    """
    axes = len(size)
    axis_of = [[-1 if a == axis else 1 for a in range(2 * axes + 1)] for axis in range(2 * axes + 1)]
    rows = torch.arange(batch, dtype=torch.int32, device=device).reshape(axis_of[axes])
    absent: Tensor | None = None
    for axis in range(axes):
        taps = torch.arange(kernel[axis], dtype=torch.int32, device=device).reshape(axis_of[axis])
        count = transposed_output_size(
            size[axis], kernel[axis], stride[axis], padding[axis], dilation[axis],
            output_padding[axis],
        )  # fmt: skip
        cells = torch.arange(count, dtype=torch.int32, device=device)
        wide = cells.reshape(axis_of[axes + 1 + axis]) + padding[axis] - taps * dilation[axis]
        read = torch.div(wide, stride[axis], rounding_mode="floor")
        rows = rows * size[axis] + read
        beyond = (read * stride[axis] != wide) | (read < 0) | (read >= size[axis])
        absent = beyond if absent is None else absent | beyond
    assert absent is not None
    return torch.where(absent, -1, rows).reshape(math.prod(kernel), -1).to(torch.int32)


def transposed_output_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, output_padding: int
) -> int:
    """Returns how many cells a transposed convolution has along an axis."""
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Returns how many cells a convolution has along an axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _by_rows(
    rows: Tensor,
    neighbors: Tensor,
    weight: Tensor,
    weight_shape: Sequence[int],
    isa: str,
    *epilogue: object,
) -> Tensor:
    """The convolution of rows, by a weight as it is (isa "") or one packed for an instruction set."""
    shape = [weight_shape[0], math.prod(weight_shape[1:-1]), weight_shape[-1]]
    if isa:
        return fquant_kernels.sparse_conv_int8_packed(
            rows,
            weight,
            shape,
            isa,
            neighbors,
            *epilogue,  # type: ignore[arg-type]
        )
    return fquant_kernels.sparse_conv_int8(
        rows,
        weight.reshape(shape),
        neighbors,
        *epilogue,  # type: ignore[arg-type]
    )


def _linear(
    x: Tensor,
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
    rows = x.reshape(-1, weight_shape[1])
    neighbors = torch.arange(rows.shape[0], dtype=torch.int32, device=x.device).unsqueeze(0)
    if residual is not None:
        residual = residual.reshape(-1, weight_shape[0])
    shape = [weight_shape[0], 1, weight_shape[1]]
    y = _by_rows(
        rows, neighbors, weight, shape, isa, scale, bias, residual, residual_scale, relu, out_dtype
    )
    return y.reshape(*x.shape[:-1], weight_shape[0])


def _conv(
    x: Tensor,
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
        return _grouped_conv(
            x, weight, scale, bias, residual, residual_scale, relu, out_dtype,
            (stride, padding, dilation, groups),
        )  # fmt: skip
    size = x.shape[2:]
    neighbors = dense_neighbors(x.shape[0], size, kernel, stride, padding, dilation, x.device)
    out_size = [
        output_size(*axis) for axis in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    y = _by_rows(
        _rows(x), neighbors, weight, weight_shape, isa, scale, bias,
        None if residual is None else _rows(residual), residual_scale, relu, out_dtype,
    )  # fmt: skip
    return y.reshape(x.shape[0], *out_size, weight_shape[0]).movedim(-1, 1)


def _conv_transpose(
    x: Tensor,
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
) -> Tensor:
    size = x.shape[2:]
    geometry = (weight_shape[1:-1], stride, padding, dilation, output_padding)
    neighbors = transposed_neighbors(x.shape[0], size, *geometry, x.device)
    out_size = [transposed_output_size(*axis) for axis in zip(size, *geometry, strict=True)]
    y = _by_rows(
        _rows(x), neighbors, weight, weight_shape, isa, scale, bias,
        None if residual is None else _rows(residual), residual_scale, relu, out_dtype,
    )  # fmt: skip
    return y.reshape(x.shape[0], *out_size, weight_shape[0]).movedim(-1, 1)


def _add(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, relu: bool, scale: Tensor, format: str
) -> Tensor:
    """`saturate(round((a * a_scale + b * b_scale) / scale))`, each operation rounded in float32."""
    y = a.to(torch.float32) * a_scale + b.to(torch.float32) * b_scale
    return quantize(y.clamp(min=0.0) if relu else y, scale, spec=format_from_text(format)).q


def _dequantize_packed(
    packed: Tensor, length: int, scale: Tensor, format: str, dtype: torch.dtype
) -> Tensor:
    """The values of codes of up to 4 bits, two or four to a byte (`fquant.PackedTensor`)."""
    spec = format_from_text(format)
    return dequantize(PackedTensor(packed, scale, spec=spec, length=length, dtype=dtype))


def _rows(x: Tensor) -> Tensor:
    """(batch, channels, *size) as rows of channels: no copy for a tensor in channels-last order."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _grouped_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    relu: bool,
    out_dtype: torch.dtype,
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
) -> Tensor:
    """A grouped convolution in floats that hold whole numbers: the same sums, exactly."""
    products = math.prod(weight.shape[1:])
    wide = torch.float32 if products <= EXACT_IN_FLOAT32 else torch.float64
    conv = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    sums = conv(x.to(wide), weight.movedim(-1, 1).to(wide), None, *geometry)
    shape = [-1] + [1] * (x.ndim - 2)
    bias = None if bias is None else bias.view(shape)
    return requantize(sums, scale.view(shape), bias, residual, residual_scale, relu, out_dtype)


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


linear_int8 = define_composite_op(
    f"linear_int8(Tensor x, {_WEIGHT}, {_EPILOGUE}) -> Tensor", _linear
)
conv_int8 = define_composite_op(
    f"conv_int8(Tensor x, {_WEIGHT}, {_EPILOGUE}, int[] stride, int[] padding, int[] dilation, "
    "int groups) -> Tensor",
    _conv,
)
conv_transpose_int8 = define_composite_op(
    f"conv_transpose_int8(Tensor x, {_WEIGHT}, {_EPILOGUE}, int[] stride, int[] padding, "
    "int[] dilation, int[] output_padding) -> Tensor",
    _conv_transpose,
)
add_int8 = define_composite_op(
    "add_int8(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, bool relu, Tensor scale, "
    "str format) -> Tensor",
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
