"""`SparseConvTensor` to `SparseTensor` and back, over the same memory."""

from typing import Any

import spconv.pytorch as package
import torch

from fquant.sparse.tensor import SparseTensor


def from_spconv(x: Any, check: bool = True) -> SparseTensor:
    """Returns the record of an spconv tensor; features and coordinates are shared, not copied.

    Args:
        x: a `SparseConvTensor` of float features.
        check: whether to check the coordinates, which spconv does not.

    Raises:
        TypeError: x is no SparseConvTensor.
        ValueError: (with check) as `SparseTensor.create`.

    Example:
        >>> import spconv.pytorch
        >>> x = spconv.pytorch.SparseConvTensor(torch.ones(1, 2), torch.tensor([[0, 3]]).int(), [4], 1)
        >>> from_spconv(x).to_dense()[0, 0]
        tensor([0., 0., 0., 1.])
    """
    if not isinstance(x, package.SparseConvTensor):
        raise TypeError(f"from_spconv: x must be a SparseConvTensor, got {type(x).__name__}.")
    shape = tuple(int(size) for size in x.spatial_shape)
    make = SparseTensor.create if check else SparseTensor
    return make(x.features, x.indices, shape, int(x.batch_size))


def to_spconv(x: SparseTensor) -> Any:
    """Returns the spconv tensor of a record; features and coordinates are shared.

    They are copied only where spconv would misread them: it takes int32 coordinates, and row-major
    memory without asking.

    Raises:
        TypeError: x is no SparseTensor of float features.
        ValueError: the grid has sides or cells that spconv's int32 indices cannot count.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0]]]))
        >>> to_spconv(x).indices
        tensor([[0, 1]], dtype=torch.int32)
    """
    if not isinstance(x, SparseTensor) or not isinstance(x.features, torch.Tensor):
        got = type(getattr(x, "features", x)).__name__
        raise TypeError(f"to_spconv: x must be a SparseTensor of float features, got {got}.")
    if max(x.spatial_shape) >= 2**31:
        raise ValueError(
            f"to_spconv: spatial_shape must have sides below 2^31, got {x.spatial_shape}."
        )
    indices = x.coords.to(torch.int32).contiguous()
    features = x.features.contiguous()
    return package.SparseConvTensor(features, indices, list(x.spatial_shape), x.batch_size)
