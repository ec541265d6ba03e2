"""Pair rulebooks: the present entries of a kernel map as lists, for convolutions on a CPU.

Of the 27 taps of a submanifold map an outdoor scan has 4 to 6 per voxel; the other entries of the
table are -1, and a convolution spends its time on reading them where there are few channels. Layers
that share a map list the pairs once: 5 bytes each, against 108 bytes per output row of the table.
spconv caches such lists, too, as indice pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fquant_kernels import native

BLOCK_ROWS = 256  # kBlockRows of csrc/conv.h
_SLACK = 64  # entries past the last one that may be overwritten while listing


class PairRulebook(NamedTuple):
    """The pairs (input row, output row) of a kernel map, by block of 256 output rows, then by tap.

    Pairs `splits[b * K + k]` to `splits[b * K + k + 1] - 1` are those of block b and tap k, by output
    row: input row `inputs[p]` is read by output row `256 * b + rows[p]`.
    """

    splits: Tensor  # (ceil(M / 256) * K + 1,) int64
    inputs: Tensor  # (P,) int32
    rows: Tensor  # (P,) uint8


def num_blocks(num_outputs: int) -> int:
    """Returns how many blocks of output rows there are."""
    return -(-num_outputs // BLOCK_ROWS)


def pair_rulebook_reference(neighbors: Tensor) -> PairRulebook:
    """Returns what `pair_rulebook` does, by plain tensor operations."""
    num_taps, num_outputs = neighbors.shape
    count = num_blocks(num_outputs)
    table = neighbors.new_full((num_taps, count * BLOCK_ROWS), -1)
    table[:, :num_outputs] = neighbors
    blocks = table.view(num_taps, count, BLOCK_ROWS).transpose(0, 1)
    present = blocks >= 0
    splits = torch.zeros(count * num_taps + 1, dtype=torch.int64, device=neighbors.device)
    splits[1:] = present.sum(dim=2).flatten().cumsum(0)
    return PairRulebook(splits, blocks[present], present.nonzero()[:, 2].to(torch.uint8))


def pair_rulebook(neighbors: Tensor, num_inputs: int, isa: str | None = None) -> PairRulebook:
    """Returns the pair rulebook of a kernel map, on its device.

    How many pairs there are depends on the data, so it has no place in a compiled region.

    Args:
        neighbors: `(K, M)` int32, -1 for absent (`kernel_neighbors`).
        num_inputs: N, how many input rows there are.
        isa: one of `native.ISAS`, for tests.

    Raises:
        TypeError: neighbors is not int32.
        ValueError: neighbors is not 2-d.
        IndexError: an entry is N or more.

    Example:
        >>> neighbors = torch.tensor([[-1, 0], [0, 1]], dtype=torch.int32)
        >>> splits, inputs, rows = pair_rulebook(neighbors, num_inputs=2)
        >>> splits
        tensor([0, 1, 3])
        >>> inputs, rows
        (tensor([0, 0, 1], dtype=torch.int32), tensor([1, 0, 1], dtype=torch.uint8))
    """
    if neighbors.dtype != torch.int32:
        raise TypeError(f"pair_rulebook: neighbors must be int32, got {neighbors.dtype}.")
    if neighbors.dim() != 2:
        raise ValueError(f"pair_rulebook: neighbors must be (K, M), got {tuple(neighbors.shape)}.")
    if neighbors.device.type != "cpu" or native.why_unavailable() is not None:
        if neighbors.numel() and int(neighbors.max()) >= num_inputs:
            native.raise_for(native.INDEX_OUT_OF_RANGE, "pair_rulebook")
        return pair_rulebook_reference(neighbors)
    num_taps, num_outputs = neighbors.shape
    table = neighbors.contiguous()
    splits = torch.empty(num_blocks(num_outputs) * num_taps + 1, dtype=torch.int64)
    # Room for a full table. What is not written of it costs no memory.
    inputs = torch.empty(table.numel() + _SLACK, dtype=torch.int32)
    rows = torch.empty(table.numel() + _SLACK, dtype=torch.uint8)
    status = native.library().fquant_list_pairs(
        native.choose_isa(isa),
        table.data_ptr(),
        num_taps,
        num_outputs,
        num_inputs,
        *(t.data_ptr() for t in (splits, inputs, rows)),
    )
    native.raise_for(status, "pair_rulebook")
    count = int(splits[-1])
    return PairRulebook(splits, inputs[:count].clone(), rows[:count].clone())
