"""Sparse convolution in plain tensor operations: right under every torch transform.

Where no derivative can be asked for, the same sums come from `fquant_kernels.sparse_conv_float`,
faster and without a table of gathered features (`fquant.sparse.capture.fast_kernel_serves` is the
rule). The two differ by the order of summation: by at most `2 n 2^-24 sum |x w|` for sums of n
products, in float32.
"""

from collections.abc import Sequence

from torch import Tensor

from fquant.checks import require_same_device
from fquant.interception.stack import quantizable
from fquant.records import QTensor
from fquant.sparse import capture
from fquant.sparse.geometry import Sizes
from fquant.sparse.kernel_map import (
    KernelMap,
    conv_map,
    subm_map,
    transpose_map,
    transposed_conv_map,
)
from fquant.sparse.tensor import SparseTensor


@quantizable(inputs=("x",), weight="weight")
def subm_conv(
    x: SparseTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: Sizes | None = None,
    kernel_map: KernelMap | None = None,
) -> SparseTensor:
    """Returns the submanifold convolution of x: same cells, same order, `(N, Cout)` features.

        y[o] = bias + sum_k weight[:, k] @ x[o + (k - kernel // 2) * dilation]     (absent cells are 0)

    It equals `torch.nn.functional.conv` of the densified tensor with padding
    `kernel // 2 * dilation`, read at the cells of x. Differentiable in features, weight and bias.

    Args:
        x: features `(N, Cin)`; N may be 0.
        weight: `(Cout, *kernel_size, Cin)` (KRSC), odd kernel sizes, the dtype of the features.
        bias: `(Cout,)`.
        dilation: cells between taps, 1 unless given; only without a kernel_map.
        kernel_map: `subm_map(x, ...)`, to share it between layers and to stay traceable; None to
            build it here, which reads values and so runs in eager code only.

    Raises:
        TypeError: x is no SparseTensor of float features, or weight has another dtype.
        ValueError: weight, bias or kernel_map does not fit x or is on another device.

    References:
        Graham, van der Maaten 2017, Submanifold Sparse Convolutional Networks, arXiv 1706.01307.
    """
    check_conv_args("subm_conv", x, weight, bias)
    if kernel_map is None:
        spacing = 1 if dilation is None else dilation
        kernel_map = subm_map(x, tuple(weight.shape[1:-1]), spacing)
    elif dilation is not None:
        raise ValueError(f"subm_conv: dilation must be left to kernel_map, got {dilation}.")
    return convolve("subm_conv", x, weight, bias, kernel_map)


@quantizable(inputs=("x",), weight="weight")
def sparse_conv(
    x: SparseTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sizes | None = None,
    padding: Sizes | None = None,
    dilation: Sizes | None = None,
    kernel_map: KernelMap | None = None,
) -> SparseTensor:
    """Returns the convolution of x at every output cell that reads an active cell.

        y[o] = bias + sum_k weight[:, k] @ x[o * stride - padding + k * dilation]  (absent cells are 0)

    It equals `torch.nn.functional.conv` of the densified tensor, read at those cells, which are
    sorted by linear key. Differentiable in features, weight and bias.

    Args:
        x: features `(N, Cin)`; N may be 0.
        weight: `(Cout, *kernel_size, Cin)` (KRSC), the dtype of the features.
        bias: `(Cout,)`.
        stride: input cells per output cell, 1 unless given; only without a kernel_map.
        padding: cells of zeros around the grid, 0 unless given; likewise.
        dilation: cells between taps, 1 unless given; likewise.
        kernel_map: `conv_map(x, ...)`, or `transpose_map` of one for an inverse convolution; None to
            build it here, which reads values and so runs in eager code only.

    Raises:
        TypeError: x is no SparseTensor of float features, or weight has another dtype.
        ValueError: weight, bias or kernel_map does not fit x or is on another device.
    """
    check_conv_args("sparse_conv", x, weight, bias)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    given = {name: value for name, value in geometry.items() if value is not None}
    if kernel_map is None:
        kernel_map = conv_map(x, tuple(weight.shape[1:-1]), **given)
    elif given:
        raise ValueError(f"sparse_conv: geometry must be left to kernel_map, got {given}.")
    return convolve("sparse_conv", x, weight, bias, kernel_map)


@quantizable(inputs=("x",), weight="weight")
def sparse_conv_transpose(
    x: SparseTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sizes | None = None,
    padding: Sizes | None = None,
    dilation: Sizes | None = None,
    output_padding: Sizes | None = None,
    kernel_map: KernelMap | None = None,
) -> SparseTensor:
    """Returns the transposed convolution of x at every output cell that an active cell writes.

        y[i * stride - padding + k * dilation] += weight[:, k] @ x[i],    y += bias

    It equals `torch.nn.functional.conv_transpose` of the densified tensor with the weight
    `weight.movedim(-1, 0)`, read at those cells, which are sorted by linear key. Differentiable in
    features, weight and bias.

    Args:
        x: features `(N, Cin)`; N may be 0.
        weight: `(Cout, *kernel_size, Cin)` (KRSC), the dtype of the features.
        bias: `(Cout,)`.
        stride: output cells per input cell, 1 unless given; only without a kernel_map.
        padding: output cells cut off around the grid, 0 unless given; likewise.
        dilation: output cells between taps, 1 unless given; likewise.
        output_padding: output cells added after each axis, 0 unless given; likewise.
        kernel_map: `transposed_conv_map(x, ...)`, to share it and to stay traceable; None to build it
            here, which reads values and so runs in eager code only.

    Raises:
        TypeError: x is no SparseTensor of float features, or weight has another dtype.
        ValueError: a size is out of range; weight, bias or kernel_map does not fit x.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0]]]))
        >>> y = sparse_conv_transpose(x, torch.tensor([[[1.0], [2.0]]]), stride=2)
        >>> y.to_dense()
        tensor([[[ 0.,  0.,  5., 10.]]])
    """
    check_conv_args("sparse_conv_transpose", x, weight, bias)
    geometry = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "output_padding": output_padding,
    }
    given = {name: value for name, value in geometry.items() if value is not None}
    if kernel_map is None:
        kernel_map = transposed_conv_map(x, tuple(weight.shape[1:-1]), **given)
    elif given:
        raise ValueError(
            f"sparse_conv_transpose: geometry must be left to kernel_map, got {given}."
        )
    return convolve("sparse_conv_transpose", x, weight, bias, kernel_map)


@quantizable(inputs=("x",), weight="weight")
def sparse_inverse_conv(
    x: SparseTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_map: KernelMap,
    transposed: bool = False,
) -> SparseTensor:
    """Returns the transposed convolution of x at the very cells that a convolution started from.

    It is `sparse_conv_transpose` read at the inputs of `kernel_map`, in their order: how a U-Net goes
    back up. Differentiable in features, weight and bias.

    Args:
        x: features `(M, Cin)` at the outputs of the convolution.
        weight: `(Cout, *kernel_size, Cin)` (KRSC) of its kernel size.
        bias: `(Cout,)`.
        kernel_map: the map of the convolution or pooling that is undone.
        transposed: whether kernel_map is its `transpose_map` already.

    Raises:
        TypeError: x is no SparseTensor of float features, or weight has another dtype.
        ValueError: weight, bias or kernel_map does not fit x or is on another device.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0, 7.0, 0.0]]]))
        >>> down = fquant.sparse.conv_map(x, kernel_size=2, stride=2)
        >>> coarse = fquant.sparse.sparse_conv(x, torch.ones(1, 2, 1), kernel_map=down)
        >>> sparse_inverse_conv(coarse, torch.ones(1, 2, 1), kernel_map=down).to_dense()
        tensor([[[0., 5., 7., 0.]]])
    """
    check_conv_args("sparse_inverse_conv", x, weight, bias)
    back = kernel_map if transposed else transpose_map(kernel_map)
    return convolve("sparse_inverse_conv", x, weight, bias, back)


def convolve(
    function: str, x: SparseTensor, weight: Tensor, bias: Tensor | None, kernel_map: KernelMap
) -> SparseTensor:
    """Returns the convolution over a kernel map: gather the neighbors, then one matrix product."""
    check_map(function, x, weight.shape, kernel_map)
    assert isinstance(x.features, Tensor)  # by check_conv_args
    flat_weight = weight.flatten(1, -2)  # (Cout, K, Cin)
    return outputs(kernel_map, capture.conv(x.features, flat_weight, kernel_map.neighbors, bias))


def outputs(kernel_map: KernelMap, features: Tensor | QTensor) -> SparseTensor:
    """Returns features at the output cells of a map."""
    m = kernel_map
    return SparseTensor(features, m.out_coords, m.out_shape, m.batch_size)


def check_conv_args(function: str, x: SparseTensor, weight: Tensor, bias: Tensor | None) -> None:
    """Checks everything but the kernel map; reads no values."""
    if not isinstance(x, SparseTensor):
        raise TypeError(f"{function}: x must be a SparseTensor, got {type(x).__name__}.")
    if not isinstance(x.features, Tensor) or not x.features.is_floating_point():
        got = x.features.dtype if isinstance(x.features, Tensor) else type(x.features).__name__
        raise TypeError(
            f"{function}: features must be a floating-point tensor, got {got}. "
            "int8 features go through sparse_conv_int8."
        )
    if weight.dtype != x.features.dtype:
        raise TypeError(
            f"{function}: weight must have the features' dtype {x.features.dtype}, "
            f"got {weight.dtype}."
        )
    require_same_device(function, "weight", weight, x.features)
    check_weight_shape(function, x, tuple(weight.shape))
    if bias is None:
        return
    require_same_device(function, "bias", bias, x.features)
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"{function}: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}."
        )


def check_weight_shape(function: str, x: SparseTensor, shape: tuple[int, ...]) -> None:
    """Raises unless shape is `(Cout, *kernel_size, Cin)` for x."""
    axes, channels = len(x.spatial_shape), x.features.shape[1]
    if len(shape) != axes + 2 or shape[-1] != channels:
        raise ValueError(
            f"{function}: weight must have shape (Cout, *kernel_size, Cin) with {axes} kernel sizes "
            f"and Cin = {channels} like the features, got {shape}."
        )


def check_map(
    function: str, x: SparseTensor, weight_shape: Sequence[int] | None, kernel_map: KernelMap
) -> None:
    """Raises unless the map was built for as many cells as x has, and for the weight's kernel."""
    features = x.features.q if isinstance(x.features, QTensor) else x.features
    require_same_device(function, "kernel_map", kernel_map.neighbors, features)
    if x.features.shape[0] != kernel_map.in_coords.shape[0]:
        raise ValueError(
            f"{function}: kernel_map must be built for the {x.features.shape[0]} rows of "
            f"x.features, got one for {kernel_map.in_coords.shape[0]}."
        )
    if x.spatial_shape != kernel_map.in_shape:
        raise ValueError(
            f"{function}: kernel_map must be built for the grid {x.spatial_shape}, "
            f"got one for {kernel_map.in_shape}."
        )
    if weight_shape is not None and tuple(weight_shape[1:-1]) != kernel_map.kernel_size:
        raise ValueError(
            f"{function}: kernel_map must have the weight's kernel size "
            f"{tuple(weight_shape[1:-1])}, got {kernel_map.kernel_size}."
        )
