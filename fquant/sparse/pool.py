"""Pooling over the active cells of each window."""

import torch
from torch import Tensor

from fquant.records import QTensor
from fquant.sparse.conv import Sizes, check_map, gather_neighbors, outputs
from fquant.sparse.kernel_map import KernelMap, conv_map
from fquant.sparse.tensor import SparseTensor


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
        lowest = torch.iinfo(f.q.dtype).min
        q = _window_max(f.q, kernel_map.neighbors, lowest)
        return outputs(kernel_map, QTensor(q, f.scale, f.zero_point, spec=f.spec, dtype=f.dtype))
    return outputs(kernel_map, _window_max(x.features, kernel_map.neighbors, float("-inf")))


def _window_max(features: Tensor, neighbors: Tensor, lowest: float) -> Tensor:
    return gather_neighbors(features, neighbors, lowest).max(dim=0).values
