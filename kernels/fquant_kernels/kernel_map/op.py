"""The kernel-map ops: argument checks, fake impls, registration.

They have no floating-point argument, so nothing can be differentiated through them. Output sizes
that depend on values are unbacked under `torch.compile`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fquant_kernels import native
from fquant_kernels.kernel_map import cpu, reference
from fquant_kernels.library import define_inference_op
from fquant_kernels.registry import offer
from fquant_kernels.triton_support import register_triton

MAX_DIMS = 8
_GEOMETRY = "SymInt[] spatial_shape, int[] kernel_size, int[] stride, int[] padding, int[] dilation"


def _check_coords(function: str, name: str, coords: Tensor, num_axes: int) -> None:
    if coords.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{function}: {name} must be int32 or int64, got {coords.dtype}.")
    if coords.ndim != 2 or coords.shape[1] != 1 + num_axes:
        raise ValueError(
            f"{function}: {name} must have shape ('N', {1 + num_axes}), one batch column and "
            f"{num_axes} axes as spatial_shape has, got {tuple(coords.shape)}."
        )


def _check_geometry(
    function: str,
    spatial_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int] | None = None,
) -> None:
    num_axes = len(spatial_shape)
    if not 1 <= num_axes <= MAX_DIMS:
        raise ValueError(f"{function}: spatial_shape must have 1 to {MAX_DIMS} axes.")
    arguments: dict[str, tuple[Sequence[int], int]] = {
        "kernel_size": (kernel_size, 1),
        "stride": (stride, 1),
        "padding": (padding, 0),
        "dilation": (dilation, 1),
        "output_padding": (padding if output_padding is None else output_padding, 0),
    }
    for name, (values, least) in arguments.items():
        if len(values) != num_axes or min(values) < least:
            raise ValueError(
                f"{function}: {name} must be {num_axes} ints of at least {least}, "
                f"got {list(values)}."
            )


def _check_output_coords(function: str, coords: Tensor, *geometry: Sequence[int]) -> None:
    _check_geometry(function, *geometry)
    _check_coords(function, "coords", coords, len(geometry[0]))


def check_conv_output_coords(coords: Tensor, *geometry: Sequence[int]) -> None:
    """Checks dtypes and shapes; reads no coordinates."""
    _check_output_coords("fquant::conv_output_coords", coords, *geometry)


def check_transposed_conv_output_coords(coords: Tensor, *geometry: Sequence[int]) -> None:
    """Checks dtypes and shapes; reads no coordinates."""
    _check_output_coords("fquant::transposed_conv_output_coords", coords, *geometry)


def check_kernel_neighbors(coords: Tensor, out_coords: Tensor, *geometry: Sequence[int]) -> None:
    """Checks dtypes, shapes and devices; reads no coordinates."""
    name = "fquant::kernel_neighbors"
    _check_output_coords(name, coords, *geometry)
    _check_coords(name, "out_coords", out_coords, len(geometry[0]))
    if out_coords.device != coords.device:
        raise ValueError(
            f"{name}: out_coords must be on {coords.device} like coords, got {out_coords.device}."
        )


def check_transpose_neighbors(neighbors: Tensor, num_inputs: int) -> None:
    """Checks dtype, shape and count; reads no entries."""
    name = "fquant::transpose_neighbors"
    if neighbors.dtype != torch.int32:
        raise TypeError(f"{name}: neighbors must be int32, got {neighbors.dtype}.")
    if neighbors.ndim != 2:
        raise ValueError(f"{name}: neighbors must be (K, M), got {tuple(neighbors.shape)}.")
    if num_inputs < 0:
        raise ValueError(f"{name}: num_inputs must be at least 0, got {num_inputs}.")


def _fake_output_coords(coords: Tensor, *geometry: Sequence[int]) -> Tensor:
    num_outputs = torch.library.get_ctx().new_dynamic_size()
    return coords.new_empty((num_outputs, coords.shape[1]))


def _fake_kernel_neighbors(
    coords: Tensor,
    out_coords: Tensor,
    spatial_shape: Sequence[int],
    kernel_size: Sequence[int],
    *rest: Sequence[int],
) -> Tensor:
    shape = (math.prod(kernel_size), out_coords.shape[0])
    return coords.new_empty(shape, dtype=torch.int32)


def _fake_transpose_neighbors(neighbors: Tensor, num_inputs: int) -> Tensor:
    return neighbors.new_empty((neighbors.shape[0], num_inputs))


def _define(schema: str, check_args: Any, implementation: Any, fake: Any, on_cpu: Any) -> Any:
    instead = "Coordinates are integers: differentiate with respect to features."
    op = define_inference_op(schema, check_args, implementation, fake, instead)
    offer(op, "cpu", "cpp", check_args, on_cpu, native.why_unavailable)
    return op


_conv_output_coords = _define(
    f"conv_output_coords(Tensor coords, {_GEOMETRY}) -> Tensor",
    check_conv_output_coords,
    reference.conv_output_coords,
    _fake_output_coords,
    cpu.conv_output_coords,
)
_transposed_conv_output_coords = _define(
    f"transposed_conv_output_coords(Tensor coords, {_GEOMETRY}, int[] output_padding) -> Tensor",
    check_transposed_conv_output_coords,
    reference.transposed_conv_output_coords,
    _fake_output_coords,
    cpu.transposed_conv_output_coords,
)
_kernel_neighbors = _define(
    f"kernel_neighbors(Tensor coords, Tensor out_coords, {_GEOMETRY}) -> Tensor",
    check_kernel_neighbors,
    reference.kernel_neighbors,
    _fake_kernel_neighbors,
    cpu.kernel_neighbors,
)
register_triton(
    _kernel_neighbors,
    check_kernel_neighbors,
    "fquant_kernels.kernel_map.cuda_triton",
    reference.kernel_neighbors,
)
_transpose_neighbors = _define(
    "transpose_neighbors(Tensor neighbors, SymInt num_inputs) -> Tensor",
    check_transpose_neighbors,
    reference.transpose_neighbors,
    _fake_transpose_neighbors,
    cpu.transpose_neighbors,
)


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

    Example:
        >>> coords = torch.tensor([[0, 3], [0, 4]])
        >>> conv_output_coords(coords, [8], [3], [2], [1], [1]).tolist()
        [[0, 1], [0, 2]]
    """
    geometry = (spatial_shape, kernel_size, stride, padding, dilation)
    return _conv_output_coords(coords, *map(list, geometry))


def transposed_conv_output_coords(
    coords: Tensor,
    spatial_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
) -> Tensor:
    """Returns the voxels `i * stride - padding + k * dilation` in the output grid, by key.

    Args as `conv_output_coords`; the grid is `reference.transposed_conv_output_shape`.
    """
    geometry = (spatial_shape, kernel_size, stride, padding, dilation, output_padding)
    return _transposed_conv_output_coords(coords, *map(list, geometry))


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

    Output voxel `o` reads input voxel `o * stride - padding + k * dilation` by offset `k`. A
    submanifold convolution is the case `out_coords = coords`, `stride = 1`,
    `padding = kernel_size // 2 * dilation`.

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

    Example:
        >>> coords = torch.tensor([[0, 3], [0, 4]])
        >>> kernel_neighbors(coords, coords, [8], [3], [1], [1], [1]).tolist()
        [[-1, 0], [0, 1], [1, -1]]
    """
    geometry = (spatial_shape, kernel_size, stride, padding, dilation)
    return _kernel_neighbors(coords, out_coords, *map(list, geometry))


def transpose_neighbors(neighbors: Tensor, num_inputs: int) -> Tensor:
    """Returns the transposed map: for each offset and input the output that reads it, or -1.

    At a fixed offset an input is read by at most one output, so the transpose of the transpose is
    the table.

    Args:
        neighbors: `(K, M)` int32, values in `[-1, num_inputs)`.
        num_inputs: N, the number of input voxels.

    Returns:
        `(K, N)` int32, values in `[-1, M)`.
    """
    return _transpose_neighbors(neighbors, num_inputs)
