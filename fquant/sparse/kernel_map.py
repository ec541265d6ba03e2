"""`KernelMap`: which input cell meets which output cell under which kernel offset.

Kernel maps depend on coordinates alone. Build them once, outside `torch.compile` and outside
transforms, and hand them to every layer of the same geometry as an argument: then each layer's
output shape follows from its inputs, and one compiled graph serves every number of cells.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from torch import Tensor

import fquant_kernels
from fquant.pytree import record, static
from fquant.sparse.geometry import Geometry, Sizes, inverse_name, per_axis
from fquant.sparse.tensor import check_coords
from fquant_kernels.kernel_map import conv_output_shape, transposed_conv_output_shape


class Cells(Protocol):
    """The cells of a grid: what a SparseTensor has, and a KernelMap for its outputs."""

    @property
    def coords(self) -> Tensor: ...
    @property
    def spatial_shape(self) -> tuple[int, ...]: ...
    @property
    def batch_size(self) -> int: ...


@record
class KernelMap:
    """The reads of a convolution: output m reads, at offset k, input row `neighbors[k, m]`.

    The input cell of output cell o at offset k is `o * stride - padding + k * dilation`, in the same
    grid of the batch. spconv calls such a table indice pairs.

    Attributes:
        neighbors: `(K, M)` int32, -1 where the cell is not active; K runs over `kernel_size` in
            row-major order.
        in_coords: `(N, 1 + D)`, the cells it reads.
        out_coords: `(M, 1 + D)`, the cells it writes.
        in_shape: the grid of the inputs.
        out_shape: the grid of the outputs.
        batch_size: number of grids.
        kernel_size: taps per axis.
        geometry: `Geometry.name` of what it was built with; "" for a map put together by hand.
        pairs: `neighbors` as lists, from `with_pairs`, or None: what int8 convolutions on a CPU then
            read.
    """

    neighbors: Tensor
    in_coords: Tensor
    out_coords: Tensor
    in_shape: tuple[int, ...] = static()
    out_shape: tuple[int, ...] = static()
    batch_size: int = static()
    kernel_size: tuple[int, ...] = static()
    geometry: str = static(default="")
    pairs: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def coords(self) -> Tensor:
        """The output cells, so that a map can stand where the next level's cells are asked for."""
        return self.out_coords

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """The grid of the outputs."""
        return self.out_shape


def subm_map(cells: Cells, kernel_size: Sizes, dilation: Sizes = 1) -> KernelMap:
    """Returns the map of a submanifold convolution: the outputs are the inputs, in their order.

    Args:
        cells: a SparseTensor, or a KernelMap for the cells it writes.
        kernel_size: taps per axis, odd; one int for all axes or one per axis.
        dilation: cells between taps.

    Raises:
        TypeError, ValueError: coords as in `SparseTensor.create`.
        ValueError: kernel_size is even, or a size is not positive.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0, 7.0]]]))
        >>> subm_map(x, kernel_size=3).neighbors
        tensor([[-1,  0],
                [ 0,  1],
                [ 1, -1]], dtype=torch.int32)
    """
    axes = len(cells.spatial_shape)
    kernel = per_axis("subm_map", "kernel_size", kernel_size, axes, 1)
    spacing = per_axis("subm_map", "dilation", dilation, axes, 1)
    if any(k % 2 == 0 for k in kernel):
        raise ValueError(
            f"subm_map: kernel_size must be odd, so that a tap lies on the cell itself, got {kernel}."
        )
    check_coords("subm_map", cells.coords, cells.spatial_shape, cells.batch_size)
    padding = tuple(k // 2 * d for k, d in zip(kernel, spacing, strict=True))
    shape, coords = cells.spatial_shape, cells.coords
    geometry = Geometry("subm", kernel, (1,) * axes, padding, spacing)
    neighbors = fquant_kernels.kernel_neighbors(coords, coords, shape, *geometry.sizes)
    return KernelMap(
        neighbors, coords, coords, shape, shape, cells.batch_size, kernel, geometry.name
    )


def conv_map(
    cells: Cells,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
) -> KernelMap:
    """Returns the map of a convolution: the outputs are all cells that read an active one.

    Outputs are sorted by linear key. The output grid is torch's,
    `(size + 2 padding - dilation (kernel - 1) - 1) // stride + 1`.

    Args:
        cells: a SparseTensor, or a KernelMap for the cells it writes.
        kernel_size: taps per axis; this and the next, one int for all axes or one per axis.
        stride: input cells per output cell.
        padding: input cells of zeros before and after each axis.
        dilation: cells between taps.

    Raises:
        TypeError, ValueError: coords as in `SparseTensor.create`.
        ValueError: a size is out of range, or the output grid would be empty.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0, 7.0, 0.0]]]))
        >>> conv_map(x, kernel_size=2, stride=2).neighbors
        tensor([[-1,  1],
                [ 0, -1]], dtype=torch.int32)
    """
    axes = len(cells.spatial_shape)
    kernel = per_axis("conv_map", "kernel_size", kernel_size, axes, 1)
    step = per_axis("conv_map", "stride", stride, axes, 1)
    border = per_axis("conv_map", "padding", padding, axes, 0)
    spacing = per_axis("conv_map", "dilation", dilation, axes, 1)
    shape = cells.spatial_shape
    geometry = Geometry("conv", kernel, step, border, spacing)
    out_shape = conv_output_shape(shape, *geometry.sizes)
    if min(out_shape) < 1:
        raise ValueError(
            f"conv_map: kernel_size {kernel} with dilation {spacing} must fit the padded grid "
            f"{shape}, got an output grid of {out_shape}."
        )
    check_coords("conv_map", cells.coords, shape, cells.batch_size)
    coords, batch_size = cells.coords, cells.batch_size
    out_coords = fquant_kernels.conv_output_coords(coords, shape, *geometry.sizes)
    neighbors = fquant_kernels.kernel_neighbors(coords, out_coords, shape, *geometry.sizes)
    return KernelMap(
        neighbors, coords, out_coords, shape, out_shape, batch_size, kernel, geometry.name
    )


def transposed_conv_map(
    cells: Cells,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    output_padding: Sizes = 0,
) -> KernelMap:
    """Returns the map of a transposed convolution, which makes new cells around the active ones.

    Input cell i writes, at offset k, output cell `i * stride - padding + k * dilation` where that
    is in the output grid, whose size is torch's,
    `(size - 1) stride - 2 padding + dilation (kernel - 1) + output_padding + 1`. Outputs are sorted
    by linear key. For the inverse of a convolution, at that convolution's inputs, use
    `transpose_map`.

    Args:
        cells: a SparseTensor, or a KernelMap for the cells it writes.
        kernel_size: taps per axis; this and the next, one int for all axes or one per axis.
        stride: output cells per input cell.
        padding: output cells cut off before and after each axis.
        dilation: output cells between taps.
        output_padding: output cells added after each axis.

    Raises:
        TypeError, ValueError: coords as in `SparseTensor.create`.
        ValueError: a size is out of range, or the output grid would be empty.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0]]]))
        >>> transposed_conv_map(x, kernel_size=2, stride=2).out_coords.tolist()
        [[0, 2], [0, 3]]
    """
    axes = len(cells.spatial_shape)
    name = "transposed_conv_map"
    kernel = per_axis(name, "kernel_size", kernel_size, axes, 1)
    step = per_axis(name, "stride", stride, axes, 1)
    border = per_axis(name, "padding", padding, axes, 0)
    spacing = per_axis(name, "dilation", dilation, axes, 1)
    extra = per_axis(name, "output_padding", output_padding, axes, 0)
    shape = cells.spatial_shape
    geometry = Geometry("transposed", kernel, step, border, spacing, extra)
    out_shape = transposed_conv_output_shape(shape, *geometry.sizes, extra)
    if min(out_shape) < 1:
        raise ValueError(
            f"{name}: padding {border} must leave a cell of the output, "
            f"got an output grid of {out_shape}."
        )
    check_coords(name, cells.coords, shape, cells.batch_size)
    coords, batch_size = cells.coords, cells.batch_size
    out_coords = fquant_kernels.transposed_conv_output_coords(coords, shape, *geometry.sizes, extra)
    # A convolution from the output grid to the input cells reads just what this one writes.
    reads = fquant_kernels.kernel_neighbors(out_coords, coords, out_shape, *geometry.sizes)
    neighbors = fquant_kernels.transpose_neighbors(reads, out_coords.shape[0])
    return KernelMap(
        neighbors, coords, out_coords, shape, out_shape, batch_size, kernel, geometry.name
    )


def transpose_map(kernel_map: KernelMap) -> KernelMap:
    """Returns the map that reads where `kernel_map` writes: that of the inverse convolution.

    Its outputs are the inputs of `kernel_map`, in their order; offsets are not flipped, as in
    torch's transposed convolution. Transposing twice gives the map back.
    """
    m = kernel_map
    neighbors = fquant_kernels.transpose_neighbors(m.neighbors, m.in_coords.shape[0])
    return KernelMap(
        neighbors,
        m.out_coords,
        m.in_coords,
        m.out_shape,
        m.in_shape,
        m.batch_size,
        m.kernel_size,
        inverse_name(m.geometry),
    )


def with_pairs(kernel_map: KernelMap) -> KernelMap:
    """Returns the map with its pairs listed, for int8 convolutions on a CPU.

    They then read the lists, 5 bytes per pair, and not the table, of which most is empty: 16 channels
    take two thirds of the time, 32 four fifths, 64 and more nearly the same. The result is the same.
    Listing takes as long as one convolution saves or a little more, so it pays where layers share the
    map.

    Raises:
        IndexError: neighbors has an entry that is no input row.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0, 7.0]]]))
        >>> splits, inputs, rows = with_pairs(subm_map(x, kernel_size=3)).pairs
        >>> inputs, rows                      # at each offset in turn
        (tensor([0, 0, 1, 1], dtype=torch.int32), tensor([1, 0, 1, 0], dtype=torch.uint8))
    """
    m = kernel_map
    splits, inputs, rows = fquant_kernels.pair_rulebook(m.neighbors, m.in_coords.shape[0])
    return dataclasses.replace(m, pairs=(splits, inputs, rows))


def build_map(cells: Cells, geometry: Geometry) -> KernelMap:
    """Returns `subm_map`, `conv_map` or `transposed_conv_map` of the cells, as the geometry says.

    Raises:
        TypeError, ValueError: as the function that builds the map.
    """
    kernel, step, border, spacing = geometry.sizes
    if geometry.kind == "subm":
        return subm_map(cells, kernel, spacing)
    if geometry.kind == "conv":
        return conv_map(cells, kernel, step, border, spacing)
    return transposed_conv_map(cells, kernel, step, border, spacing, geometry.output_padding)
