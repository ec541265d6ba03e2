"""Joining sparse tensors: sums and concatenations at the same cells, sums over the union of cells."""

import functools
import operator

import torch

from fquant.checks import require_data, require_same_device, values_readable
from fquant.interception.stack import opaque
from fquant.sparse.capture import gather_neighbors
from fquant.sparse.kernel_map import Cells, KernelMap
from fquant.sparse.tensor import SparseTensor
from fquant_kernels import kernel_neighbors
from fquant_kernels.kernel_map.reference import coords_of_keys, linear_keys


def add_features(*tensors: SparseTensor) -> SparseTensor:
    """Returns the sum of sparse tensors at the same cells in the same order: a residual.

    Rules can quantize its operands: it is the operation "add".

    Raises:
        TypeError: an argument is no SparseTensor of float features.
        ValueError: there is none; grids, cells, channels or devices differ.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0, 7.0]]]))
        >>> add_features(x, x.map(torch.neg)).features.T
        tensor([[0., 0.]])
    """
    _require_same_cells("add_features", tensors)
    channels = [t.features.shape[1] for t in tensors]
    if len(set(channels)) > 1:
        raise ValueError(f"add_features: tensors must have the same channels, got {channels}.")
    return _first(tensors, functools.reduce(operator.add, (t.features for t in tensors)))


def join_features(*tensors: SparseTensor) -> SparseTensor:
    """Returns sparse tensors at the same cells in the same order with their channels side by side.

    Rules can quantize its operands: it is the operation "cat".

    Raises:
        TypeError, ValueError: as `add_features`, but for channels, which may differ.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0, 7.0]]]))
        >>> join_features(x, x.map(torch.neg)).features
        tensor([[ 5., -5.],
                [ 7., -7.]])
    """
    _require_same_cells("join_features", tensors)
    return _first(tensors, torch.cat([t.features for t in tensors], dim=1))  # type: ignore[misc]


@opaque
def union_maps(*cells: Cells) -> tuple[KernelMap, ...]:
    """Returns one map per set of cells, of one tap each, all writing the union of the cells.

    The union is sorted by linear key. It reads values, so it runs in eager code.

    Args:
        cells: SparseTensors or KernelMaps on one grid.

    Raises:
        ValueError: there is none, or grids or devices differ.

    Example:
        >>> a = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0, 7.0]]]))
        >>> b = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[1.0, 0.0, 2.0]]]))
        >>> [m.neighbors.tolist() for m in union_maps(a, b)]
        [[[-1, 0, 1]], [[0, -1, 1]]]
    """
    _require_same_grid("union_maps", cells)
    require_data("union_maps", "coords", cells[0].coords)
    shape = cells[0].spatial_shape
    keys = torch.cat([linear_keys(c.coords, shape) for c in cells]).unique()
    out_coords = coords_of_keys(keys, shape, cells[0].coords.dtype)
    one, none = (1,) * len(shape), (0,) * len(shape)
    maps = []
    for c in cells:
        neighbors = kernel_neighbors(c.coords, out_coords, shape, one, one, none, one)
        maps.append(
            KernelMap(neighbors, c.coords, out_coords, shape, shape, c.batch_size, one, "union")
        )
    return tuple(maps)


def sparse_add(
    *tensors: SparseTensor, kernel_maps: tuple[KernelMap, ...] | None = None
) -> SparseTensor:
    """Returns the sum of sparse tensors of different cells: the densified sum, at their union.

    Differentiable; cells are sorted by linear key.

    Args:
        tensors: float features on one grid, with the same channels.
        kernel_maps: `union_maps(*tensors)`, to stay traceable; None to build them here.

    Raises:
        TypeError: an argument is no SparseTensor of float features.
        ValueError: there is none; grids, channels or devices differ; kernel_maps are not as many.

    Example:
        >>> a = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0, 7.0]]]))
        >>> b = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[1.0, 0.0, 2.0]]]))
        >>> sparse_add(a, b).features.T
        tensor([[1., 5., 9.]])
    """
    _require_floats("sparse_add", tensors)
    _require_same_grid("sparse_add", tensors)
    first, channels = tensors[0], [t.features.shape[1] for t in tensors]
    if len(set(channels)) > 1:
        raise ValueError(f"sparse_add: tensors must have the same channels, got {channels}.")
    maps = union_maps(*tensors) if kernel_maps is None else kernel_maps
    rows = [m.in_coords.shape[0] for m in maps]
    if rows != [t.features.shape[0] for t in tensors]:
        raise ValueError(
            "sparse_add: kernel_maps must be union_maps of the tensors, with "
            f"{[t.features.shape[0] for t in tensors]} rows, got {rows}."
        )
    for m in maps:
        require_same_device("sparse_add", "kernel_maps", m.neighbors, first.coords)
    parts = [
        gather_neighbors(t.features, m.neighbors, 0.0)[:, 0]  # type: ignore[arg-type]
        for t, m in zip(tensors, maps, strict=True)
    ]
    features = functools.reduce(operator.add, parts)
    return SparseTensor(features, maps[0].out_coords, first.spatial_shape, first.batch_size)


def _first(tensors: tuple[SparseTensor, ...], features: object) -> SparseTensor:
    """The first tensor with other features, and the maps of all."""
    first = tensors[0]
    maps = {key: m for t in reversed(tensors) for key, m in (t.maps or {}).items()} or None
    return SparseTensor(
        features,  # type: ignore[arg-type]
        first.coords,
        first.spatial_shape,
        first.batch_size,
        maps,
        first.cells,
    )


def _require_floats(function: str, tensors: tuple[SparseTensor, ...]) -> None:
    for t in tensors:
        if not isinstance(t, SparseTensor) or not isinstance(t.features, torch.Tensor):
            got = type(getattr(t, "features", t)).__name__
            raise TypeError(
                f"{function}: tensors must be SparseTensors of float features, got {got}."
            )
        require_same_device(function, "coords", t.coords, t.features)


def _require_same_grid(function: str, cells: tuple[Cells, ...]) -> None:
    if not cells:
        raise ValueError(f"{function}: tensors must be at least one, got none.")
    grids = [(c.batch_size, *c.spatial_shape) for c in cells]
    if len(set(grids)) > 1:
        raise ValueError(f"{function}: tensors must have one batch size and grid, got {grids}.")
    for c in cells[1:]:
        require_same_device(function, "tensors", c.coords, cells[0].coords)


def _require_same_cells(function: str, tensors: tuple[SparseTensor, ...]) -> None:
    _require_floats(function, tensors)
    _require_same_grid(function, tensors)
    first = tensors[0].coords
    for t in tensors[1:]:
        same = t.coords is first or t.coords.shape == first.shape
        if same and t.coords is not first and values_readable(first, t.coords):
            same = torch.equal(t.coords.long(), first.long())
        if not same:
            raise ValueError(
                f"{function}: tensors must have the same cells in the same order, got others among "
                f"{first.shape[0]} and {t.coords.shape[0]} rows. sparse_add sums over the union."
            )
