"""Dense oracles: the same operation on the densified tensor, by torch's own operators."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fquant.sparse import SparseTensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv_dense(
    dense: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Returns the convolution of `(B, Cin, *spatial)` with a KRSC weight, for 1 to 4 spatial axes.

    torch has no 4-D convolution; there it is the sum over the first kernel axis of 3-D ones.
    """
    kernel = weight.movedim(-1, 1)
    if dense.ndim <= 5:
        conv = _CONV[dense.ndim - 2]
        return conv(dense, kernel, bias, tuple(stride), tuple(padding), tuple(dilation))
    first = dense.shape[2]
    steps = (first + 2 * padding[0] - dilation[0] * (kernel.shape[2] - 1) - 1) // stride[0] + 1
    slices = []
    for step in range(steps):
        reads = [step * stride[0] - padding[0] + k * dilation[0] for k in range(kernel.shape[2])]
        parts = [
            F.conv3d(
                dense[:, :, row] if 0 <= row < first else dense[:, :, 0] * 0.0,
                kernel[:, :, k],
                None,
                tuple(stride[1:]),
                tuple(padding[1:]),
                tuple(dilation[1:]),
            )
            for k, row in enumerate(reads)
        ]
        slices.append(torch.stack(parts).sum(0))
    y = torch.stack(slices, dim=2)
    return y if bias is None else y + bias.view(-1, 1, 1, 1, 1)


def read_cells(dense: Tensor, cells: SparseTensor) -> Tensor:
    """Returns the rows `(N, C)` of a dense `(B, C, *spatial)` at the cells of a sparse tensor."""
    return dense.movedim(1, -1)[tuple(cells.coords.long().T)]


def conv_transpose_dense(
    dense: Tensor,
    weight: Tensor,
    out_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Returns the transposed convolution of `(B, Cin, *spatial)` with a KRSC weight, 1 to 4 axes.

    By its definition: the gradient of the convolution, from a grid of `out_shape`, with respect to its
    input. Differentiable in turn.
    """
    target = dense.new_zeros(dense.shape[0], weight.shape[0], *out_shape, requires_grad=True)
    y = conv_dense(target, weight.transpose(0, -1), None, stride, padding, dilation)
    return torch.autograd.grad(y, target, dense, create_graph=True)[0]


def windows_dense(
    dense: Tensor,
    out_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    fill: float,
) -> Tensor:
    """Returns `(K, B, C, *out_shape)`: what each window of a pooling holds, `fill` beyond the grid."""
    pad = [p for border in reversed(padding) for p in (border, border)]
    padded = F.pad(dense, pad, value=fill)
    taps = []
    for offset in itertools.product(*map(range, kernel_size)):
        tap = padded
        for axis, k in enumerate(offset):
            first = k * dilation[axis]
            reach = first + (out_shape[axis] - 1) * stride[axis] + 1
            tap = tap[(slice(None),) * (axis + 2) + (slice(first, reach, stride[axis]),)]
        taps.append(tap)
    return torch.stack(taps)
