"""`SparseTensor`: features at the active cells of a batch of regular grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fquant.checks import require_data, require_same_device, values_readable
from fquant.pytree import record, static
from fquant.records import QTensor
from fquant_kernels.kernel_map import linear_keys

if TYPE_CHECKING:
    from fquant.sparse.kernel_map import KernelMap

LARGEST_KEY = 2**63 - 1


@record
class SparseTensor:
    """Rows of features with the grid cell each belongs to; cells without a row are zero.

    The constructor stores what it is given, so that transforms may put any leaf in place;
    `SparseTensor.create` checks, and so does everything that builds a kernel map.

    Attributes:
        features: `(N, C)` floating point, or a QTensor of that shape.
        coords: `(N, 1 + D)` int32 or int64 rows `(batch, x_0, ..., x_{D-1})`, no row twice, D from
            1 to 4; in any order, which every function that keeps the cells keeps too.
        spatial_shape: the grid, D sizes.
        batch_size: number of grids.
        maps: kernel maps by key, which the modules of `fquant.sparse.nn` find and add to, so that
            layers of one geometry share them; None for none yet.
        cells: the keys of the maps that led from the first cells to these; `()` at the first cells.
    """

    features: Tensor | QTensor
    coords: Tensor
    spatial_shape: tuple[int, ...] = static()
    batch_size: int = static()
    maps: Mapping[str, KernelMap] | None = None
    cells: tuple[str, ...] = static(default=())

    @classmethod
    def create(
        cls,
        features: Tensor | QTensor,
        coords: Tensor,
        spatial_shape: Sequence[int],
        batch_size: int,
    ) -> SparseTensor:
        """Returns the record after checking it.

        Raises:
            TypeError: coords is not an int32 or int64 tensor.
            ValueError: features and coords differ in length or device; a shape or size does not fit;
                a row of coords is negative, outside the grid or there twice; the grid has 2^63 cells
                or more.

        Example:
            >>> x = fquant.sparse.SparseTensor.create(
            ...     torch.tensor([[1.0], [2.0]]), torch.tensor([[0, 0, 1], [0, 2, 2]]), (3, 3), 1
            ... )
            >>> x.to_dense()[0, 0]
            tensor([[0., 1., 0.],
                    [0., 0., 0.],
                    [0., 0., 2.]])
        """
        shape = tuple(int(size) for size in spatial_shape)
        check_coords("SparseTensor.create", coords, shape, batch_size)
        if len(features.shape) != 2 or features.shape[0] != coords.shape[0]:
            raise ValueError(
                f"SparseTensor.create: features must have shape (N, C) with N = {coords.shape[0]} "
                f"like coords, got {tuple(features.shape)}."
            )
        values = features.q if isinstance(features, QTensor) else features
        require_same_device("SparseTensor.create", "coords", coords, values)
        return cls(features, coords, shape, batch_size)

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseTensor:
        """Returns the cells of `dense`, `(B, C, *spatial)`, where any channel is not zero.

        Rows are sorted by linear key. Differentiable; the number of rows depends on values, so it
        runs in eager code.

        Raises:
            ValueError: dense has no or more than 4 spatial axes.
        """
        if not 3 <= dense.ndim <= 6:
            raise ValueError(
                "SparseTensor.from_dense: dense must have shape (B, C, *spatial) with 1 to 4 "
                f"spatial axes, got {tuple(dense.shape)}."
            )
        channels_last = dense.movedim(1, -1)
        active = (channels_last != 0).any(dim=-1)
        coords = active.nonzero()
        return cls(channels_last[active], coords, tuple(dense.shape[2:]), dense.shape[0])

    def to_dense(self) -> Tensor:
        """Returns `(B, C, *spatial)` with the features in place and zeros elsewhere; differentiable.

        Rows of padding (see `fquant.sparse.capacity`) are left out.

        Raises:
            TypeError: the features are quantized; `fquant.dequantize` the record first.
            ValueError: features and coords are on two devices; (where values can be read) coords as in
                `create`.
        """
        if isinstance(self.features, QTensor):
            raise TypeError("SparseTensor.to_dense: features must be a tensor, got QTensor.")
        require_same_device("SparseTensor.to_dense", "coords", self.coords, self.features)
        shape, padding = self.spatial_shape, (self.coords == -1).all(dim=1)
        if values_readable(self.coords):
            check_coords("SparseTensor.to_dense", self.coords[~padding], shape, self.batch_size)
        cells, channels = self.batch_size * math.prod(shape), self.features.shape[1]
        keys = torch.where(padding, cells, linear_keys(self.coords, shape))
        flat = self.features.new_zeros(cells + 1, channels).index_put((keys,), self.features)
        return flat[:cells].view(self.batch_size, *shape, channels).movedim(-1, 1)

    def map(self, function: Callable[[Tensor], Tensor]) -> SparseTensor:
        """Returns the record with `function(features)` for features, for example `torch.relu`."""
        return self.with_features(function(self.features))  # type: ignore[arg-type]  # or QTensor

    def with_features(self, features: Tensor | QTensor) -> SparseTensor:
        """Returns the record with other features at the same cells."""
        shape, batch_size = self.spatial_shape, self.batch_size
        return SparseTensor(features, self.coords, shape, batch_size, self.maps, self.cells)

    def __add__(self, other: SparseTensor | Tensor) -> SparseTensor:
        """Returns `add_features(self, other)`, or the record with a tensor added to its features."""
        from fquant.sparse.combine import add_features  # which needs this module

        if isinstance(other, SparseTensor):
            return add_features(self, other)
        return self.with_features(self.features + other)  # type: ignore[operator]  # or QTensor

    # spconv's names, so that forwards written for its tensors run on these.

    @property
    def indices(self) -> Tensor:
        """The coords."""
        return self.coords

    def replace_feature(self, features: Tensor) -> SparseTensor:
        """Returns `with_features(features)`."""
        return self.with_features(features)

    def dense(self) -> Tensor:
        """Returns `to_dense()` in contiguous memory, of which forwards take views."""
        return self.to_dense().contiguous()


def check_coords(
    function: str, coords: Tensor, spatial_shape: tuple[int, ...], batch_size: int
) -> None:
    """Raises unless coords are distinct cells of a grid whose linear keys fit int64."""
    if not isinstance(coords, Tensor) or coords.dtype not in (torch.int32, torch.int64):
        got = coords.dtype if isinstance(coords, Tensor) else type(coords).__name__
        raise TypeError(f"{function}: coords must be an int32 or int64 tensor, got {got}.")
    if not 1 <= len(spatial_shape) <= 4 or min(spatial_shape) < 1:
        raise ValueError(
            f"{function}: spatial_shape must be 1 to 4 positive sizes, got {spatial_shape}."
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"{function}: batch_size must be a positive int, got {batch_size!r}.")
    if coords.ndim != 2 or coords.shape[1] != 1 + len(spatial_shape):
        raise ValueError(
            f"{function}: coords must have shape (N, {1 + len(spatial_shape)}), the batch and one "
            f"column per axis of spatial_shape {spatial_shape}, got {tuple(coords.shape)}."
        )
    require_data(function, "coords", coords)
    if batch_size * math.prod(spatial_shape) > LARGEST_KEY:
        raise ValueError(
            f"{function}: batch_size * prod(spatial_shape) must be below 2^63, "
            f"got {batch_size} * prod({spatial_shape})."
        )
    if coords.shape[0] == 0:
        return
    sizes = torch.tensor([batch_size, *spatial_shape], device=coords.device)
    if bool((coords.amin(0) < 0).any()) or bool((coords.amax(0) >= sizes).any()):
        outside = ((coords < 0) | (coords >= sizes)).any(dim=1)
        raise ValueError(
            f"{function}: coords must lie in [0, {tuple(sizes.tolist())}), "
            f"got row {coords[outside][0].tolist()}."
        )
    unsorted = linear_keys(coords, spatial_shape)
    if bool((unsorted[1:] > unsorted[:-1]).all()):  # as maps have them: nothing to sort
        return
    keys = unsorted.sort()
    repeated = keys.values[1:] == keys.values[:-1]
    if bool(repeated.any()):
        row = coords[keys.indices[1:][repeated][0]].tolist()
        raise ValueError(f"{function}: coords must not repeat a row, got {row} twice.")
