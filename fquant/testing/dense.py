"""Dense oracles: the same operation on the densified tensor, by torch's own operators."""

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
                dense[:, :, row] if 0 <= row < first else torch.zeros_like(dense[:, :, 0]),
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
