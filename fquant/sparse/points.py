"""Voxelization: points with features to one row per occupied cell."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fquant.checks import require_data, require_floating, require_same_device
from fquant.interception.stack import opaque
from fquant.sparse.tensor import LARGEST_KEY, SparseTensor
from fquant_kernels.kernel_map.reference import coords_of_keys

REDUCTIONS = ("mean", "max", "first")
OUTSIDE, OVER_LIMIT = -1, -2  # rows of points that are in no voxel of the result


class VoxelLimitWarning(UserWarning):
    """Voxels were left out, because there are more than `max_voxels`."""


@opaque
def from_points(
    points: Tensor,
    features: Tensor,
    voxel_size: float | Sequence[float],
    lower: Sequence[float],
    upper: Sequence[float],
    *,
    batch: Tensor | None = None,
    batch_size: int = 1,
    reduce: str = "mean",
    max_points: int | None = None,
    max_voxels: int | None = None,
) -> tuple[SparseTensor, Tensor]:
    """Returns (cells, cell_of_point): the occupied voxels of a range, and each point's row in them.

    Point p lies in cell `floor((p - lower) / voxel_size)`; points outside `[lower, upper)`, and
    points that are not finite, are left out and get row -1. Rows are sorted by linear key, and
    points of a cell are reduced in their order, so the result is deterministic. Runs in eager code.

    Args:
        points: `(P, D)` float positions, D from 1 to 4; P may be 0.
        features: `(P, C)` float.
        voxel_size: edge of a voxel, in units of points, one or one per axis.
        lower: least position per axis; the corner of the grid.
        upper: end of the range per axis; the grid has `ceil((upper - lower) / voxel_size)` cells.
        batch: `(P,)` integer sample of each point; None for one sample.
        batch_size: number of samples.
        reduce: "mean", "max" or "first" of the features of a cell's points; differentiable.
        max_points: how many points of a cell take part, the first ones in order; None for all.
        max_voxels: how many cells of a sample there may be, those that come first in the order of
            points; the others are left out with a VoxelLimitWarning, and their points get row -2.
            None for all.

    Raises:
        TypeError: points or features is not a floating-point tensor.
        ValueError: a shape does not fit, the range is empty, a sample is out of range, reduce is
            none of the three, max_points or max_voxels is not positive, or devices differ.

    Example:
        >>> points = torch.tensor([[0.1, 0.2], [0.3, 0.4], [2.5, 0.1]])
        >>> cells, row = from_points(points, torch.tensor([[1.0], [3.0], [7.0]]), 1.0, [0, 0], [4, 4])
        >>> cells.coords.tolist(), cells.features.T, row
        ([[0, 0, 0], [0, 2, 0]], tensor([[2., 7.]]), tensor([0, 0, 1]))
    """
    require_floating("from_points", "points", points)
    require_floating("from_points", "features", features)
    require_data("from_points", "points", points)
    require_same_device("from_points", "points", points, features)
    low, high, size, shape = _grid(points, voxel_size, lower, upper, batch_size)
    count = points.shape[0]
    if features.ndim != 2 or features.shape[0] != count:
        raise ValueError(
            f"from_points: features must have shape (P, C) with P = {count} like points, "
            f"got {tuple(features.shape)}."
        )
    if reduce not in REDUCTIONS:
        raise ValueError(f"from_points: reduce must be one of {REDUCTIONS}, got {reduce!r}.")
    for name, limit in (("max_points", max_points), ("max_voxels", max_voxels)):
        if limit is not None and limit < 1:
            raise ValueError(f"from_points: {name} must be at least 1, got {limit}.")
    sample = _samples(points, batch, batch_size)

    position = points.detach().double()
    inside = ((position >= low) & (position < high)).all(dim=1)  # False for NaN
    cell = ((position[inside] - low) / size).floor().long()
    # A point just below `upper` may divide to the next cell in floating point.
    cell = torch.minimum(cell, torch.tensor(shape, device=cell.device) - 1)
    keys = sample[inside]
    for axis, cells in enumerate(shape):
        keys = keys * cells + cell[:, axis]
    unique, row = keys.unique(return_inverse=True)
    if max_voxels is not None:
        unique, row = _limited(unique, row, unique // math.prod(shape), max_voxels)
    cell_of_point = torch.full((count,), OUTSIDE, dtype=torch.int64, device=points.device)
    cell_of_point[inside] = row
    values, row_of = features[cell_of_point >= 0], row[row >= 0]
    if max_points is not None:
        taking_part = _place_in_group(row_of) < max_points
        values, row_of = values[taking_part], row_of[taking_part]
    reduced = _reduce(values, row_of, unique.shape[0], reduce)
    coords = coords_of_keys(unique, shape, torch.int32 if max(shape) < 2**31 else torch.int64)
    return SparseTensor(reduced, coords, shape, batch_size), cell_of_point


def _grid(
    points: Tensor,
    voxel_size: float | Sequence[float],
    lower: Sequence[float],
    upper: Sequence[float],
    batch_size: int,
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    axes = len(lower)
    if points.ndim != 2 or points.shape[1] != axes or not 1 <= axes <= 4:
        raise ValueError(
            f"from_points: points must have shape (P, {axes}) like lower, with 1 to 4 axes, "
            f"got {tuple(points.shape)}."
        )
    edges = [voxel_size] * axes if isinstance(voxel_size, int | float) else list(voxel_size)
    if len(edges) != axes or len(upper) != axes or min(edges) <= 0:
        raise ValueError(
            f"from_points: voxel_size and upper must have {axes} values like lower, sizes positive, "
            f"got {voxel_size} and {tuple(upper)}."
        )

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=points.device)

    low, high, size = column(lower), column(upper), column(edges)
    shape = tuple(int(n) for n in ((high - low) / size).ceil().tolist())
    cells = batch_size
    for n in shape:
        cells *= n
    if min(shape) < 1 or cells > LARGEST_KEY:
        raise ValueError(
            f"from_points: the range must hold 1 to 2^63 - 1 cells, got a grid of {shape}."
        )
    return low, high, size, shape


def _samples(points: Tensor, batch: Tensor | None, batch_size: int) -> Tensor:
    if batch is None:
        return torch.zeros(points.shape[0], dtype=torch.int64, device=points.device)
    if batch.shape != points.shape[:1] or batch.is_floating_point():
        raise ValueError(
            f"from_points: batch must be integers of shape ({points.shape[0]},), "
            f"got {batch.dtype} of shape {tuple(batch.shape)}."
        )
    require_same_device("from_points", "batch", batch, points)
    if batch.numel() and not 0 <= int(batch.min()) <= int(batch.max()) < batch_size:
        raise ValueError(
            f"from_points: batch must be in [0, {batch_size}), "
            f"got {int(batch.min())} to {int(batch.max())}."
        )
    return batch.long()


def _limited(keys: Tensor, row: Tensor, sample: Tensor, max_voxels: int) -> tuple[Tensor, Tensor]:
    """Returns the keys of the cells that are kept, and each point's row among them."""
    by_point = _first_of_each(row, keys.shape[0]).argsort()
    place = torch.empty_like(by_point)
    place[by_point] = _place_in_group(sample[by_point])
    kept = place < max_voxels
    dropped = keys.shape[0] - int(kept.sum())
    if dropped == 0:
        return keys, row
    row = torch.where(kept, kept.cumsum(0) - 1, OVER_LIMIT)[row]
    warnings.warn(
        f"from_points: max_voxels = {max_voxels} a sample leaves out {dropped} of {keys.shape[0]} "
        f"voxels with {int((row == OVER_LIMIT).sum())} points, whose rows are {OVER_LIMIT}.",
        VoxelLimitWarning,
        stacklevel=3,
    )
    return keys[kept], row


def _first_of_each(group: Tensor, groups: int) -> Tensor:
    """The index of the first element of each group; every group has one."""
    order = torch.arange(group.shape[0], device=group.device)
    return order.new_full((groups,), group.shape[0]).scatter_reduce(0, group, order, "amin")


def _place_in_group(group: Tensor) -> Tensor:
    """How many elements of the same group come before each."""
    in_order, element = group.sort(stable=True)
    place = torch.empty_like(group)
    place[element] = torch.arange(group.shape[0], device=group.device) - torch.searchsorted(
        in_order, in_order
    )
    return place


def _reduce(features: Tensor, row: Tensor, num_cells: int, reduce: str) -> Tensor:
    shape = (num_cells, features.shape[1])
    if reduce == "first":
        return features[_first_of_each(row, num_cells)]
    if reduce == "max":
        index = row.unsqueeze(1).expand_as(features)
        zeros = features.new_zeros(shape)
        return zeros.scatter_reduce(0, index, features, "amax", include_self=False)
    count = features.new_zeros(num_cells).index_add(0, row, features.new_ones(row.shape[0]))
    return features.new_zeros(shape).index_add(0, row, features) / count.unsqueeze(1)
