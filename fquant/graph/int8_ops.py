"""Dense int8 layers as ops, on the sparse kernel: `fquant::linear_int8` and `fquant::conv_int8`.

A dense convolution is a sparse one in which every cell is active: its kernel map follows from sizes
alone, and a linear layer is the case of one tap. So the arithmetic is that of
`fquant_kernels.sparse_conv_int8` (exact int32 sums, then the float32 epilogue), and so is the speed.

oneDNN's int8 layers (`torch.ops.onednn.qlinear_pointwise`) do not compute these sums on CPUs without
VNNI: pairs of products saturate at int16. Of 2,112 sums of 256 full-range products 0.4 % were right on
an AVX2 machine. `torch._int_mm` is exact, and ran there at 3 GOP/s where this kernel ran at 140 to 226.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import fquant_kernels
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


linear_int8 = define_composite_op(
    f"linear_int8(Tensor x, {_WEIGHT}, {_EPILOGUE}) -> Tensor", _linear
)
conv_int8 = define_composite_op(
    f"conv_int8(Tensor x, {_WEIGHT}, {_EPILOGUE}, int[] stride, int[] padding, int[] dilation, "
    "int groups) -> Tensor",
    _conv,
)
