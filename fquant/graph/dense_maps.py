"""Kernel maps of dense convolutions: every cell of a grid is there, so they follow from sizes alone."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def dense_neighbors(
    batch: int,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Returns the kernel map of a dense convolution over rows in (batch, *size) order.

    Output cell o reads `o * stride - padding + k * dilation` by tap k; -1 outside.

    Returns:
        `(prod(kernel), batch * prod(output size))` int32.

    Example:
        >>> dense_neighbors(1, [3], [3], [1], [1], [1], torch.device("cpu"))
        tensor([[-1,  0,  1],
                [ 0,  1,  2],
                [ 1,  2, -1]], dtype=torch.int32)
    """
    axes = len(size)

    def along(values: Tensor, axis: int) -> Tensor:
        return values.reshape([-1 if a == axis else 1 for a in range(2 * axes + 1)])

    rows = along(torch.arange(batch, dtype=torch.int32, device=device), axes)
    outside = None
    for axis in range(axes):
        taps = along(torch.arange(kernel[axis], dtype=torch.int32, device=device), axis)
        count = output_size(size[axis], kernel[axis], stride[axis], padding[axis], dilation[axis])
        cells = along(torch.arange(count, dtype=torch.int32, device=device), axes + 1 + axis)
        read = cells * stride[axis] - padding[axis] + taps * dilation[axis]
        rows = rows * size[axis] + read
        if padding[axis]:
            beyond = (read < 0) | (read >= size[axis])
            outside = beyond if outside is None else outside | beyond
    rows = rows if outside is None else torch.where(outside, -1, rows)
    return rows.reshape(math.prod(kernel), -1).to(torch.int32)


def transposed_neighbors(
    batch: int,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Returns the kernel map of a dense transposed convolution, as `dense_neighbors`.

    Output cell o reads `(o + padding - k * dilation) / stride` by tap k where that is a cell.

    Example:
        >>> transposed_neighbors(1, [2], [2], [2], [0], [1], [0], torch.device("cpu"))
        tensor([[ 0, -1,  1, -1],
                [-1,  0, -1,  1]], dtype=torch.int32)
    """
    axes = len(size)
    axis_of = [
        [-1 if a == axis else 1 for a in range(2 * axes + 1)] for axis in range(2 * axes + 1)
    ]
    rows = torch.arange(batch, dtype=torch.int32, device=device).reshape(axis_of[axes])
    absent: Tensor | None = None
    for axis in range(axes):
        taps = torch.arange(kernel[axis], dtype=torch.int32, device=device).reshape(axis_of[axis])
        count = transposed_output_size(
            size[axis], kernel[axis], stride[axis], padding[axis], dilation[axis],
            output_padding[axis],
        )  # fmt: skip
        cells = torch.arange(count, dtype=torch.int32, device=device)
        wide = cells.reshape(axis_of[axes + 1 + axis]) + padding[axis] - taps * dilation[axis]
        read = torch.div(wide, stride[axis], rounding_mode="floor")
        rows = rows * size[axis] + read
        beyond = (read * stride[axis] != wide) | (read < 0) | (read >= size[axis])
        absent = beyond if absent is None else absent | beyond
    assert absent is not None
    return torch.where(absent, -1, rows).reshape(math.prod(kernel), -1).to(torch.int32)


def transposed_output_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, output_padding: int
) -> int:
    """Returns how many cells a transposed convolution has along an axis."""
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Returns how many cells a convolution has along an axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
