"""The definition of kernel maps, by sorting and binary search on int64 keys.

A convolution of `D` dimensions reads, for output voxel `o` and kernel offset `k`, the input voxel

    i = o * stride - padding + k * dilation        (cross-correlation, as torch's `conv3d`)

of the same batch element. A kernel map is the table of these reads, `neighbors` of shape
`(K, M)`: row `j` of the inputs where voxel `i` is active, -1 where it is not. `K` counts the
offsets in row-major order, so it is the middle axis of a weight `(Cout, *kernel, Cin)` flattened to
`(Cout, K, Cin)`. Offset-major tables are what both backends read fastest.

Coordinates are integer rows `(batch, x_0, ..., x_{D-1})`. Their linear key is the row-major index
into `(batch, *spatial_shape)`, in int64: a grid of 2^31 cells and more is an ordinary grid.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def linear_keys(coords: Tensor, spatial_shape: Sequence[int]) -> Tensor:
    """Returns the row-major index of each coordinate row, int64 of shape `(N,)`."""
    keys = coords[:, 0].long()
    for axis, size in enumerate(spatial_shape):
        keys = keys * size + coords[:, 1 + axis]
    return keys


def coords_of_keys(keys: Tensor, spatial_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns the coordinate rows of linear keys: the inverse of `linear_keys`."""
    columns = []
    for size in reversed(spatial_shape):
        columns.append(keys % size)
        keys = torch.div(keys, size, rounding_mode="floor")
    return torch.stack([keys, *reversed(columns)], dim=1).to(dtype)


def _inside(voxels: Tensor, spatial_shape: Sequence[int]) -> Tensor:
    size = torch.tensor(spatial_shape, device=voxels.device)
    return ((voxels[:, 1:] >= 0) & (voxels[:, 1:] < size)).all(dim=1)


def _offsets(kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, kernel_size)))


def _row(values: Sequence[int], like: Tensor) -> Tensor:
    """Batch column 0, then one value per spatial axis, int64."""
    return torch.tensor([0, *values], dtype=torch.int64, device=like.device)


def conv_output_shape(
    spatial_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Returns the output grid: `(size + 2 padding - dilation (kernel - 1) - 1) // stride + 1`."""
    axes = zip(spatial_shape, kernel_size, stride, padding, dilation, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)


def conv_output_coords(
    coords: Tensor,
    spatial_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Returns the output voxels that read at least one active input, sorted by linear key.

    Args:
        coords: `(N, 1 + D)` int32 or int64, unique rows inside `spatial_shape`; any order.
        spatial_shape: the input grid, `D` sizes; the other arguments have `D` ints each.
        kernel_size: taps per axis.
        stride: input voxels per output voxel.
        padding: input voxels of zeros before and after each axis.
        dilation: input voxels between taps.

    Returns:
        `(M, 1 + D)`, the dtype of `coords`.
    """
    out_shape = conv_output_shape(spatial_shape, kernel_size, stride, padding, dilation)
    step = _row(stride, coords)
    step[0] = 1
    shifted = coords.long() + _row(padding, coords)
    found = []
    for offset in _offsets(kernel_size):
        reach = shifted - _row([k * d for k, d in zip(offset, dilation, strict=True)], coords)
        out = torch.div(reach, step, rounding_mode="floor")
        reads = (out * step == reach).all(dim=1) & _inside(out, out_shape)
        found.append(linear_keys(out[reads], out_shape))
    return coords_of_keys(torch.cat(found).unique(), out_shape, coords.dtype)


def transposed_conv_output_shape(
    spatial_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
) -> tuple[int, ...]:
    """Returns the output grid of a transposed convolution, by torch's formula.

    (size - 1) stride - 2 padding + dilation (kernel - 1) + output_padding + 1
    """
    axes = zip(spatial_shape, kernel_size, stride, padding, dilation, output_padding, strict=True)
    return tuple((n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, s, p, d, e in axes)


def transposed_conv_output_coords(
    coords: Tensor,
    spatial_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
) -> Tensor:
    """Returns the voxels `i * stride - padding + k * dilation` in the output grid, by key."""
    out_shape = transposed_conv_output_shape(
        spatial_shape, kernel_size, stride, padding, dilation, output_padding
    )
    step = _row(stride, coords)
    step[0] = 1
    base = coords.long() * step - _row(padding, coords)
    found = []
    for offset in _offsets(kernel_size):
        out = base + _row([k * d for k, d in zip(offset, dilation, strict=True)], coords)
        found.append(linear_keys(out[_inside(out, out_shape)], out_shape))
    return coords_of_keys(torch.cat(found).unique(), out_shape, coords.dtype)


def kernel_neighbors(
    coords: Tensor,
    out_coords: Tensor,
    spatial_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Returns for each offset and output voxel the input row it reads, or -1.

    The formula is the module's. A submanifold convolution is the case `out_coords = coords`,
    `stride = 1`, `padding = kernel_size // 2 * dilation`.

    Args:
        coords: `(N, 1 + D)` int32 or int64 input voxels, unique, inside `spatial_shape`; any order.
        out_coords: `(M, 1 + D)` output voxels; any order.
        spatial_shape: the input grid, `D` sizes; the other arguments have `D` ints each.
        kernel_size: taps per axis.
        stride: input voxels per output voxel.
        padding: input voxels of zeros before and after each axis.
        dilation: input voxels between taps.

    Returns:
        `(K, M)` int32 with `K = prod(kernel_size)`, values in `[-1, N)`.
    """
    num_taps = math.prod(kernel_size)
    num_inputs = coords.shape[0]
    if num_inputs == 0 or out_coords.shape[0] == 0:
        return torch.full(
            (num_taps, out_coords.shape[0]), -1, dtype=torch.int32, device=coords.device
        )
    keys, row_of = linear_keys(coords, spatial_shape).sort()
    step = _row(stride, coords)
    step[0] = 1
    base = out_coords.long() * step - _row(padding, coords)
    table = []
    for offset in _offsets(kernel_size):
        voxels = base + _row([k * d for k, d in zip(offset, dilation, strict=True)], coords)
        wanted = linear_keys(voxels, spatial_shape)
        place = torch.searchsorted(keys, wanted).clamp(max=num_inputs - 1)
        active = (keys[place] == wanted) & _inside(voxels, spatial_shape)
        table.append(torch.where(active, row_of[place], -1))
    return torch.stack(table).to(torch.int32)


def transpose_neighbors(neighbors: Tensor, num_inputs: int) -> Tensor:
    """Returns the transposed map: for each offset and input the output that reads it, or -1.

    At a fixed offset an input is read by at most one output, so the table is a partial permutation
    per offset and its transpose is one scatter. The transpose of the transpose is the table.

    Args:
        neighbors: `(K, M)` int32, values in `[-1, num_inputs)`.
        num_inputs: N, the number of input voxels.

    Returns:
        `(K, N)` int32, values in `[-1, M)`.
    """
    num_taps, num_outputs = neighbors.shape
    spare = torch.where(neighbors < 0, num_inputs, neighbors).long()
    rows = torch.arange(num_outputs, dtype=torch.int32, device=neighbors.device)
    table = torch.full((num_taps, num_inputs + 1), -1, dtype=torch.int32, device=neighbors.device)
    return table.scatter(1, spare, rows.expand(num_taps, -1))[:, :num_inputs].contiguous()
