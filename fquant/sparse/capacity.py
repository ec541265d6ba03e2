"""Records with a fixed number of rows, for code that wants fixed shapes, such as CUDA graphs.

The rows behind the last cell are padding: coordinates -1, features 0, and no entry of a kernel map
reads them. In the rows of cells int8 convolutions and pools over padded maps give the very values they
give without padding. Float convolutions give the same sums, but on CPU in another order of taps in
the block of rows where padding begins: they differ as `fquant.sparse.conv` says. Rows of padding hold
what an output without neighbors holds. Batch norm in training mode and observers would count them: this
is for inference.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from fquant.records import QTensor
from fquant.sparse.kernel_map import KernelMap
from fquant.sparse.tensor import SparseTensor


def pad_to_capacity(x: SparseTensor, capacity: int) -> SparseTensor:
    """Returns x with `capacity` rows; those behind its own have coordinates -1 and features 0.

    Args:
        x: features `(N, C)`, float or QTensor.
        capacity: rows of the result.

    Raises:
        ValueError: x has more rows than capacity: nothing is ever cut off.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0, 7.0]]]))
        >>> pad_to_capacity(x, 3).coords.tolist()
        [[0, 1], [0, 2], [-1, -1]]
    """
    rows = x.coords.shape[0]
    _require_room("pad_to_capacity", "capacity", rows, capacity)
    coords = F.pad(x.coords, (0, 0, 0, capacity - rows), value=-1)
    features = x.features
    if isinstance(features, QTensor):
        padded: Tensor | QTensor = dataclasses.replace(features, q=_more_rows(features.q, capacity))
    else:
        padded = _more_rows(features, capacity)
    return SparseTensor(padded, coords, x.spatial_shape, x.batch_size)


def pad_map(kernel_map: KernelMap, in_capacity: int, out_capacity: int) -> KernelMap:
    """Returns the map for records padded to `in_capacity` rows, which writes `out_capacity` rows.

    Raises:
        ValueError: the map reads or writes more cells than that.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0, 7.0]]]))
        >>> kernel_map = pad_map(fquant.sparse.subm_map(x, 3), 3, 3)
        >>> kernel_map.neighbors
        tensor([[-1,  0, -1],
                [ 0,  1, -1],
                [ 1, -1, -1]], dtype=torch.int32)
        >>> weight = torch.ones(1, 3, 1)
        >>> y = fquant.sparse.sparse_conv(pad_to_capacity(x, 3), weight, kernel_map=kernel_map)
        >>> y.features.T
        tensor([[12., 12.,  0.]])
    """
    m = kernel_map
    inputs, outputs = m.in_coords.shape[0], m.out_coords.shape[0]
    _require_room("pad_map", "in_capacity", inputs, in_capacity)
    _require_room("pad_map", "out_capacity", outputs, out_capacity)
    return dataclasses.replace(
        m,
        neighbors=F.pad(m.neighbors, (0, out_capacity - outputs), value=-1),
        in_coords=F.pad(m.in_coords, (0, 0, 0, in_capacity - inputs), value=-1),
        out_coords=F.pad(m.out_coords, (0, 0, 0, out_capacity - outputs), value=-1),
        pairs=None,  # their number is no capacity
    )


def valid_count(x: SparseTensor | KernelMap) -> Tensor:
    """Returns how many rows are cells, as a 0-d int64 tensor; reads no values on the host.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0, 7.0]]]))
        >>> valid_count(pad_to_capacity(x, 8))
        tensor(2)
    """
    return (x.coords[:, 0] >= 0).sum()


def without_padding(x: SparseTensor) -> SparseTensor:
    """Returns x without rows of padding; reads the count, and so runs in eager code.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0, 7.0]]]))
        >>> without_padding(pad_to_capacity(x, 8)).features.T
        tensor([[5., 7.]])
    """
    count = int(valid_count(x))
    features = x.features
    if isinstance(features, QTensor):
        kept: Tensor | QTensor = dataclasses.replace(features, q=features.q[:count])
    else:
        kept = features[:count]
    return SparseTensor(kept, x.coords[:count], x.spatial_shape, x.batch_size)


def _more_rows(values: Tensor, capacity: int) -> Tensor:
    return torch.cat([values, values.new_zeros(capacity - values.shape[0], *values.shape[1:])])


def _require_room(function: str, argument: str, rows: int, capacity: int) -> None:
    if capacity < rows:
        raise ValueError(
            f"{function}: {argument} must hold the {rows} rows there are, got {capacity}. "
            "Choose it larger, or leave out cells yourself; none is dropped here."
        )
