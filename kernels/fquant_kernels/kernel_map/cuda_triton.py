"""Kernel maps and tile rulebooks on NVIDIA GPUs, equal to the torch definitions."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fquant_kernels.kernel_map.reference import linear_keys
from fquant_kernels.kernel_map.rulebook import (
    DEFAULT_TILE_ROWS,
    TileRulebook,
    check_tile_rows,
)
from fquant_kernels.triton_support import COMPILE_OPTIONS

# Output voxels per program: one per thread of four warps.
_BLOCK = 128
_WARPS = 4


@triton.jit
def kernel_neighbors_kernel(
    keys,  # (N,) int64, sorted
    row_of,  # (N,) int64, the input row of each key
    out_coords,  # (M, 1 + DIMS)
    geometry,  # (DIMS, 6) int64: size, stride, padding, dilation, kernel, place
    table,  # (K, M) int32
    num_inputs,
    num_outputs,
    search_steps,  # bits of num_inputs
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fills the table for a block of outputs and every offset along the last axis."""
    # A program holds the offset on every axis but the last. The reads along the last axis have
    # ascending keys, so one binary search finds the first and a step or two each of the others.
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = output < num_outputs
    coord = out_coords + output.to(tl.int64) * (1 + DIMS)
    key = tl.load(coord, mask=real, other=0).to(tl.int64)
    inside = real
    for axis in tl.static_range(DIMS - 1):
        size = tl.load(geometry + 6 * axis)
        kernel = tl.load(geometry + 6 * axis + 4)
        digit = (tl.program_id(1) // tl.load(geometry + 6 * axis + 5)) % kernel
        voxel = tl.load(coord + 1 + axis, mask=real, other=0).to(tl.int64)
        voxel = voxel * tl.load(geometry + 6 * axis + 1) - tl.load(geometry + 6 * axis + 2)
        voxel += digit * tl.load(geometry + 6 * axis + 3)
        inside = inside & (voxel >= 0) & (voxel < size)
        key = key * size + voxel
    size = tl.load(geometry + 6 * DIMS - 6)
    dilation = tl.load(geometry + 6 * DIMS - 3)
    kernel = tl.load(geometry + 6 * DIMS - 2)
    voxel = tl.load(coord + DIMS, mask=real, other=0).to(tl.int64)
    voxel = voxel * tl.load(geometry + 6 * DIMS - 5) - tl.load(geometry + 6 * DIMS - 4)
    key = key * size + voxel

    below = tl.zeros((BLOCK,), tl.int32)  # how many keys are less than `key`
    for step in range(search_steps):
        further = below + (1 << (search_steps - 1 - step))
        probe = inside & (further <= num_inputs)
        at = tl.load(keys + further - 1, mask=probe, other=0)
        below = tl.where(probe & (at < key), further, below)

    target = table + tl.program_id(1) * kernel * num_outputs + output  # `kernel` is an int64
    for _ in range(kernel):
        for _ in range(dilation):  # at most so many keys lie before the next read
            at = tl.load(keys + below, mask=inside & (below < num_inputs), other=0)
            behind = inside & (below < num_inputs) & (at < key)
            below += behind.to(tl.int32)
        found = inside & (below < num_inputs) & (voxel >= 0) & (voxel < size)
        at = tl.load(keys + below, mask=found, other=0)
        found = found & (at == key)
        row = tl.load(row_of + below, mask=found, other=-1).to(tl.int32)
        tl.store(target, row, mask=real)
        target += num_outputs
        key += dilation
        voxel += dilation


def kernel_neighbors(
    coords: Tensor,
    out_coords: Tensor,
    spatial_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Returns `reference.kernel_neighbors`: one sort, then one launch and no table of pairs."""
    num_inputs, num_outputs = coords.shape[0], out_coords.shape[0]
    shape = (math.prod(kernel_size), num_outputs)
    table = torch.empty(shape, dtype=torch.int32, device=coords.device)
    if num_inputs == 0 or table.numel() == 0:
        return table.fill_(-1)
    keys, row_of = linear_keys(coords, spatial_shape).sort()
    leading = kernel_size[:-1]
    places = [math.prod(leading[axis + 1 :]) for axis in range(len(leading))] + [1]
    axes = zip(spatial_shape, stride, padding, dilation, kernel_size, places, strict=True)
    geometry = torch.tensor(list(axes), dtype=torch.int64, device=coords.device)
    with torch.cuda.device_of(coords):
        kernel_neighbors_kernel[(triton.cdiv(num_outputs, _BLOCK), math.prod(leading))](
            keys,
            row_of,
            out_coords.contiguous(),
            geometry,
            table,
            num_inputs,
            num_outputs,
            num_inputs.bit_length(),
            DIMS=len(kernel_size),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            **COMPILE_OPTIONS,
        )
    return table


@triton.jit
def tile_rulebook_kernel(
    neighbors,  # (K, M) int32
    order,  # (M,) int32
    spans,  # (T, 2) int32
    taps,  # (T * K,) int32
    rows,  # (T * K, BLOCK_M) int32
    num_taps,
    num_outputs,
    BLOCK_M: tl.constexpr,
):
    """Writes one tile's segments."""
    tile = tl.program_id(0)
    in_tile = tl.arange(0, BLOCK_M)
    slot = tile * BLOCK_M + in_tile
    real = slot < num_outputs
    output = tl.load(order + slot, mask=real, other=0)
    begin = tile * num_taps
    end = begin
    source = neighbors + output
    for tap in range(num_taps):
        row = tl.load(source, mask=real, other=-1)
        # Without a branch: what no row needs is written too, and then written over.
        tl.store(taps + end, tap)
        tl.store(rows + end.to(tl.int64) * BLOCK_M + in_tile, row)
        end += (tl.max(row, axis=0) >= 0).to(tl.int32)
        source += num_outputs
    tl.store(spans + 2 * tile, begin)
    tl.store(spans + 2 * tile + 1, end)


def tile_rulebook(
    neighbors: Tensor, tile_rows: int = DEFAULT_TILE_ROWS, order: Tensor | None = None
) -> TileRulebook:
    """Returns `rulebook.tile_rulebook` with `compact=False`, in one launch, without a sync.

    The segments outside the tiles' spans are left unwritten.
    """
    check_tile_rows("tile_rulebook", tile_rows)
    num_taps, num_outputs = neighbors.shape
    num_tiles = triton.cdiv(num_outputs, tile_rows)
    if order is None:
        order = torch.arange(num_outputs, dtype=torch.int32, device=neighbors.device)
    order = order.to(torch.int32).contiguous()
    spans = neighbors.new_empty(num_tiles, 2)
    taps = neighbors.new_empty(num_tiles * num_taps)
    rows = neighbors.new_empty(num_tiles * num_taps, tile_rows)
    if num_tiles:
        with torch.cuda.device_of(neighbors):
            tile_rulebook_kernel[(num_tiles,)](
                neighbors.contiguous(),
                order,
                spans,
                taps,
                rows,
                num_taps,
                num_outputs,
                BLOCK_M=tile_rows,
                num_warps=max(1, min(4, tile_rows // 32)),
                **COMPILE_OPTIONS,
            )
    return TileRulebook(spans, taps, rows, order)
