"""Pooling, per window and per sample."""

import math

import torch
from torch import Tensor

from fquant.checks import require_same_device, values_readable
from fquant.interception.stack import opaque
from fquant.records import QTensor
from fquant.sparse.capture import gather_neighbors, window_max
from fquant.sparse.conv import check_map, outputs
from fquant.sparse.geometry import Sizes
from fquant.sparse.kernel_map import KernelMap, conv_map
from fquant.sparse.tensor import SparseTensor


@opaque
def max_pool(
    x: SparseTensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    *,
    kernel_map: KernelMap | None = None,
) -> SparseTensor:
    """Returns, for each window that holds an active cell, the largest value of its active cells.

    Cells that are not active take no part, so a window of negative values has a negative maximum.
    Quantized features are pooled as integers, exactly, and keep their scale. Where values tie, one of
    them takes the derivative. Outputs are sorted by linear key.

    Args:
        x: features `(N, C)`, float or QTensor; N may be 0.
        kernel_size: cells per axis of a window.
        stride: cells from window to window; None for kernel_size.
        padding: cells around the grid that windows may reach into.
        dilation: cells between the cells of a window.
        kernel_map: `conv_map(x, kernel_size, stride, padding, dilation)`, to share it and to stay
            traceable; None to build it here, in eager code.

    Raises:
        TypeError: x is no SparseTensor.
        ValueError: a size is out of range, or kernel_map does not fit x.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[-2.0, -5.0, 0.0, 0.0]]]))
        >>> max_pool(x, 2).features
        tensor([[-2.]])
    """
    if not isinstance(x, SparseTensor):
        raise TypeError(f"max_pool: x must be a SparseTensor, got {type(x).__name__}.")
    if kernel_map is None:
        kernel_map = conv_map(
            x, kernel_size, kernel_size if stride is None else stride, padding, dilation
        )
    check_map("max_pool", x, None, kernel_map)
    if isinstance(x.features, QTensor):
        f = x.features
        q = window_max(f.q, kernel_map.neighbors)
        return outputs(kernel_map, QTensor(q, f.scale, f.zero_point, spec=f.spec, dtype=f.dtype))
    return outputs(kernel_map, window_max(x.features, kernel_map.neighbors))


@opaque
def avg_pool(
    x: SparseTensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    *,
    dilation: Sizes = 1,
    count_absent: bool = True,
    kernel_map: KernelMap | None = None,
) -> SparseTensor:
    """Returns, for each window that holds an active cell, the mean of its features.

    Args:
        x: float features `(N, C)`; N may be 0.
        kernel_size: cells per axis of a window.
        stride: cells from window to window; None for kernel_size.
        padding: cells around the grid that windows may reach into.
        dilation: cells between the cells of a window.
        count_absent: whether absent cells count as zeros, as `torch.nn.functional.avg_pool` of the
            densified tensor has it; otherwise the mean is over active cells, as spconv has it.
        kernel_map: `conv_map(x, kernel_size, stride, padding, dilation)`, to share it and to stay
            traceable; None to build it here, in eager code.

    Raises:
        TypeError: x is no SparseTensor of float features.
        ValueError: a size is out of range, or kernel_map does not fit x.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[6.0, 0.0, 2.0, 4.0]]]))
        >>> avg_pool(x, 2).features.T, avg_pool(x, 2, count_absent=False).features.T
        (tensor([[3., 3.]]), tensor([[6., 3.]]))
    """
    features = _float_features("avg_pool", x)
    if kernel_map is None:
        kernel_map = conv_map(
            x, kernel_size, kernel_size if stride is None else stride, padding, dilation
        )
    check_map("avg_pool", x, None, kernel_map)
    total = gather_neighbors(features, kernel_map.neighbors, 0.0).sum(dim=1)
    if count_absent:
        return outputs(kernel_map, total / kernel_map.neighbors.shape[0])
    present = (kernel_map.neighbors >= 0).sum(dim=0).clamp(min=1).to(total.dtype)
    return outputs(kernel_map, total / present.unsqueeze(1))


@opaque
def global_avg_pool(x: SparseTensor, *, count_absent: bool = True) -> Tensor:
    """Returns the mean feature of each sample, `(batch_size, C)`; zeros for a sample without cells.

    Args:
        x: float features `(N, C)`.
        count_absent: whether absent cells count as zeros, as the mean of the densified tensor;
            otherwise the mean is over active cells, as spconv documents it.

    Raises:
        TypeError: x is no SparseTensor of float features.
        ValueError: a sample is not below batch_size, or devices differ.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[6.0, 0.0, 2.0, 4.0]]]))
        >>> global_avg_pool(x), global_avg_pool(x, count_absent=False)
        (tensor([[3.]]), tensor([[4.]]))
    """
    features = _float_features("global_avg_pool", x)
    sample = _sample_of_row("global_avg_pool", x)
    total = features.new_zeros(x.batch_size + 1, features.shape[1]).index_add(0, sample, features)
    total = total[: x.batch_size]
    if count_absent:
        return total / math.prod(x.spatial_shape)
    ones = features.new_ones(features.shape[0])
    count = features.new_zeros(x.batch_size + 1).index_add(0, sample, ones).clamp(min=1)
    count = count[: x.batch_size]
    return total / count.unsqueeze(1)


def global_max_pool(x: SparseTensor) -> Tensor:
    """Returns the largest feature of each sample's active cells, `(batch_size, C)`.

    A sample without cells gets zeros. Where values tie, they share the derivative.

    Raises:
        TypeError, ValueError: as `global_avg_pool`.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[-6.0, 0.0, -2.0]]]))
        >>> global_max_pool(x)
        tensor([[-2.]])
    """
    features = _float_features("global_max_pool", x)
    sample = _sample_of_row("global_max_pool", x).unsqueeze(1).expand(-1, features.shape[1])
    largest = features.new_zeros(x.batch_size + 1, features.shape[1]).scatter_reduce(
        0, sample, features, "amax", include_self=False
    )
    return largest[: x.batch_size]


def _sample_of_row(function: str, x: SparseTensor) -> Tensor:
    """Returns the sample of each row; rows of padding (see `capacity`) get one more, to be dropped."""
    sample = x.coords[:, 0].long()
    if values_readable(sample) and bool((sample >= x.batch_size).any()):
        raise ValueError(
            f"{function}: coords must have samples below {x.batch_size}, got {int(sample.max())}."
        )
    return torch.where(sample < 0, x.batch_size, sample)


def _float_features(function: str, x: SparseTensor) -> Tensor:
    if not isinstance(x, SparseTensor):
        raise TypeError(f"{function}: x must be a SparseTensor, got {type(x).__name__}.")
    if isinstance(x.features, QTensor):
        raise TypeError(
            f"{function}: features must be a floating-point tensor, got QTensor. "
            "fquant.dequantize the record first."
        )
    require_same_device(function, "coords", x.coords, x.features)
    return x.features
