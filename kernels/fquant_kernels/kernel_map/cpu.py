"""The CPU path of kernel maps, compiled: bricks and bitmaps, sorted keys where grids are vast."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fquant_kernels import native
from fquant_kernels.kernel_map import reference


def _ints(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def kernel_neighbors(
    coords: Tensor,
    out_coords: Tensor,
    spatial_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    isa: str | None = None,
) -> Tensor:
    """Returns the table of `reference.kernel_neighbors`, entry for entry, on every `isa`."""
    coords = coords.contiguous()
    out_coords = out_coords.to(coords.dtype).contiguous()
    num_taps = 1
    for size in kernel_size:
        num_taps *= size
    table = torch.empty((num_taps, out_coords.shape[0]), dtype=torch.int32)
    status = native.library().fquant_kernel_neighbors(
        native.choose_isa(isa),
        coords.dtype == torch.int64,
        coords.data_ptr(),
        coords.shape[0],
        out_coords.data_ptr(),
        out_coords.shape[0],
        len(kernel_size),
        *map(_ints, (spatial_shape, kernel_size, stride, padding, dilation)),
        table.data_ptr(),
        native.num_threads(),
    )
    native.raise_for(status, "fquant::kernel_neighbors")
    return table


def _output_coords(
    coords: Tensor,
    spatial_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_shape: Sequence[int],
    transposed: bool,
) -> Tensor:
    coords = coords.contiguous()
    is_int64 = coords.dtype == torch.int64
    library, dims, count = native.library(), len(kernel_size), ctypes.c_int64()
    keys = library.fquant_output_keys(
        is_int64,
        coords.data_ptr(),
        coords.shape[0],
        dims,
        *map(_ints, (spatial_shape, kernel_size, stride, padding, dilation, out_shape)),
        transposed,
        ctypes.byref(count),
    )
    native.raise_for(0 if keys else native.OUT_OF_MEMORY, "fquant::conv_output_coords")
    out = None
    try:
        out = torch.empty((count.value, 1 + dims), dtype=coords.dtype)
    finally:
        library.fquant_take_coords(keys, is_int64, dims, _ints(out_shape), native.pointer(out))
    return out


def conv_output_coords(
    coords: Tensor,
    spatial_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Returns the rows of `reference.conv_output_coords`."""
    geometry = (spatial_shape, kernel_size, stride, padding, dilation)
    return _output_coords(coords, *geometry, reference.conv_output_shape(*geometry), False)


def transposed_conv_output_coords(
    coords: Tensor,
    spatial_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
) -> Tensor:
    """Returns the rows of `reference.transposed_conv_output_coords`."""
    geometry = (spatial_shape, kernel_size, stride, padding, dilation)
    out_shape = reference.transposed_conv_output_shape(*geometry, output_padding)
    return _output_coords(coords, *geometry, out_shape, True)


def transpose_neighbors(neighbors: Tensor, num_inputs: int) -> Tensor:
    """Returns the table of `reference.transpose_neighbors`.

    Raises:
        IndexError: an entry of `neighbors` is not below `num_inputs`.
    """
    neighbors = neighbors.contiguous()
    table = torch.empty((neighbors.shape[0], num_inputs), dtype=torch.int32)
    status = native.library().fquant_transpose_neighbors(
        neighbors.data_ptr(), *neighbors.shape, num_inputs, table.data_ptr(), native.num_threads()
    )
    native.raise_for(status, "fquant::transpose_neighbors")
    return table
