"""Fewer cells: what a generative decoder does with the candidates of its transposed convolutions.

candidates = sparse_conv_transpose(x, weight, stride=2)        every cell that could be there
kept = find_cells(candidates, target) >= 0                     in training; later, a classifier's
y = prune(candidates, kept)
"""

import dataclasses

import torch
from torch import Tensor

import fquant_kernels
from fquant.checks import require_same_device
from fquant.records import QTensor
from fquant.sparse.kernel_map import Cells
from fquant.sparse.tensor import SparseTensor, check_coords


def prune(x: SparseTensor, kept: Tensor) -> SparseTensor:
    """Returns x at the cells where `kept` is true, in their order; differentiable in features.

    The kernel maps of x are of other cells, and are left behind. How many cells remain depends on
    values, so it runs in eager code.

    Args:
        x: features `(N, C)`, float or QTensor.
        kept: `(N,)` bool.

    Raises:
        TypeError: x is no SparseTensor, or kept is no bool tensor.
        ValueError: kept is not `(N,)`, or is on another device.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[4.0, 5.0, -7.0]]]))
        >>> prune(x, x.features[:, 0] > 0).coords.tolist()
        [[0, 0], [0, 1]]
    """
    if not isinstance(x, SparseTensor):
        raise TypeError(f"prune: x must be a SparseTensor, got {type(x).__name__}.")
    if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
        got = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
        raise TypeError(f"prune: kept must be a bool tensor, got {got}.")
    if tuple(kept.shape) != (x.coords.shape[0],):
        raise ValueError(
            f"prune: kept must have shape ({x.coords.shape[0]},), got {tuple(kept.shape)}."
        )
    require_same_device("prune", "kept", kept, x.coords)
    rows = kept.nonzero()[:, 0]
    f = x.features
    if isinstance(f, QTensor):
        features: Tensor | QTensor = dataclasses.replace(f, q=f.q.index_select(0, rows))
    else:
        features = f.index_select(0, rows)
    return SparseTensor(features, x.coords.index_select(0, rows), x.spatial_shape, x.batch_size)


def find_cells(cells: Cells, among: Cells) -> Tensor:
    """Returns `(N,)` int32: for each of the N cells its row among others, -1 where it is not there.

    Args:
        cells: a SparseTensor, or a KernelMap for the cells it writes.
        among: the same, on the same grid.

    Raises:
        TypeError, ValueError: coords as in `SparseTensor.create`.
        ValueError: grids, batch sizes or devices differ.

    Example:
        >>> a = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[4.0, 5.0, 0.0]]]))
        >>> b = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0, 7.0]]]))
        >>> find_cells(a, b)
        tensor([-1,  0], dtype=torch.int32)
    """
    grids = [(c.batch_size, *c.spatial_shape) for c in (cells, among)]
    if grids[0] != grids[1]:
        raise ValueError(f"find_cells: among must have the grid {grids[0]}, got {grids[1]}.")
    require_same_device("find_cells", "among", among.coords, cells.coords)
    shape = cells.spatial_shape
    for c in (cells, among):
        check_coords("find_cells", c.coords, shape, c.batch_size)
    one, none = (1,) * len(shape), (0,) * len(shape)
    rows: Tensor = fquant_kernels.kernel_neighbors(
        among.coords, cells.coords, shape, one, one, none, one
    )
    return rows[0]
