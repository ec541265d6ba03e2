"""The int8 sparse convolution on NVIDIA GPUs: masked implicit GEMM over a tile rulebook.

One program computes a tile of output rows and a block of output channels. It walks the tile's
segments (the taps any of its rows has), gathers the input rows of each, and multiplies them with
the tap's weights on the tensor cores, int8 by int8 into int32. The epilogue is the reference's,
float operation by float operation. Half-precision features and weights go the same way with sums
in float32 and no scales.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fquant_kernels.conv_int8.configs import Config, config_for
from fquant_kernels.conv_int8.packing import pack_weight, pad_channels
from fquant_kernels.kernel_map.cuda_triton import tile_rulebook
from fquant_kernels.kernel_map.rulebook import DEFAULT_TILE_ROWS, TileRulebook
from fquant_kernels.triton_support import COMPILE_OPTIONS


@triton.jit
def conv_tiles_kernel(
    features,  # (N, CIN)
    weight,  # (K, COUT, CIN)
    spans,  # (T, 2) int32
    taps,  # (S,) int32
    rows,  # (S, BLOCK_M) int32
    order,  # (M,) int32
    scale,  # (COUT,) float32
    bias,  # (COUT,) float32
    residual,  # (M, COUT)
    residual_scale,  # one float32
    out,  # (M, COUT)
    num_outputs,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,  # N * CIN >= 2^31
):
    """Computes one tile of output rows by one block of output channels."""
    column_blocks: tl.constexpr = (COUT + BLOCK_N - 1) // BLOCK_N
    chunks: tl.constexpr = (CIN + BLOCK_K - 1) // BLOCK_K
    # Programs that gather the same rows are neighbours, so that the second gather hits the cache.
    tile = tl.program_id(0) // column_blocks
    columns = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_tile = tl.arange(0, BLOCK_M)
    in_chunk = tl.arange(0, BLOCK_K)
    real_column = columns < COUT

    if features.dtype.element_ty == tl.int8:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.load(spans + 2 * tile)
    last = tl.load(spans + 2 * tile + 1)
    for step in range(first * chunks, last * chunks):
        segment = step // chunks
        channels = (step % chunks) * BLOCK_K + in_chunk
        tap = tl.load(taps + segment)
        row = tl.load(rows + segment.to(tl.int64) * BLOCK_M + in_tile)
        present = (row >= 0)[:, None]
        real_weight = real_column[:, None]
        if CIN % BLOCK_K != 0:
            real_channel = (channels < CIN)[None, :]
            present = present & real_channel
            real_weight = real_weight & real_channel
        if WIDE:
            row = row.to(tl.int64)
        gathered = tl.load(features + row[:, None] * CIN + channels[None, :], mask=present, other=0)
        # Stored with the input channels last and transposed here: the other way round, sm_80 moves
        # single bytes between registers (3.3 times the instructions) and sm_90 transposes in them.
        tap_weight = weight + (tap * COUT + columns[:, None]) * CIN + channels[None, :]
        if COUT % BLOCK_N != 0 or CIN % BLOCK_K != 0:
            loaded = tl.load(tap_weight, mask=real_weight, other=0)
        else:
            loaded = tl.load(tap_weight)
        acc = tl.dot(gathered, tl.trans(loaded), acc, out_dtype=acc.dtype)

    slot = tile * BLOCK_M + in_tile
    real_slot = slot < num_outputs
    out_row = tl.load(order + slot, mask=real_slot, other=0).to(tl.int64)
    at = out_row[:, None] * COUT + columns[None, :]
    real = real_slot[:, None] & real_column[None, :]
    t = acc.to(tl.float32)
    if HAS_SCALE:
        t = t * tl.load(scale + columns, mask=real_column, other=0.0)[None, :]
    if HAS_BIAS:
        t = t + tl.load(bias + columns, mask=real_column, other=0.0)[None, :]
    if HAS_RESIDUAL:
        added = tl.load(residual + at, mask=real, other=0).to(tl.float32)
        if HAS_SCALE:
            added = tl.load(residual_scale) * added
        t = t + added
    if RELU:
        t = tl.maximum(t, 0.0)
    if out.dtype.element_ty == tl.int8:
        # 1.5 * 2^23 has a last place of 1, so adding it rounds to an integer, half to even.
        t = (tl.minimum(tl.maximum(t, -128.0), 127.0) + 12582912.0) - 12582912.0
    tl.store(out + at, t.to(out.dtype.element_ty), mask=real)


def launch(
    features: Tensor,
    packed_weight: Tensor,
    rulebook: TileRulebook,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    relu: bool,
    out_dtype: torch.dtype,
    config: Config,
) -> Tensor:
    """Returns `(M, Cout)` of `out_dtype`; contiguous tensors, channels as `packed_weight` has."""
    spans, taps, rows, order = rulebook
    _, cout, cin = packed_weight.shape
    num_outputs = order.shape[0]
    out = features.new_empty((num_outputs, cout), dtype=out_dtype)
    if out.numel() == 0:
        return out
    column_blocks = triton.cdiv(cout, config.block_n)
    with torch.cuda.device_of(features):
        conv_tiles_kernel[(spans.shape[0] * column_blocks,)](
            features,
            packed_weight,
            spans,
            taps,
            rows,
            order,
            order if scale is None else scale,
            order if bias is None else bias,
            order if residual is None else residual,
            order if residual_scale is None else residual_scale,
            out,
            num_outputs,
            CIN=cin,
            COUT=cout,
            BLOCK_M=rows.shape[1],
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            HAS_SCALE=scale is not None,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            RELU=relu,
            WIDE=features.shape[0] * cin >= 2**31,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **COMPILE_OPTIONS,
        )
    return out


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def sparse_conv_int8_tiles(
    features: Tensor,
    packed_weight: Tensor,
    spans: Tensor,
    taps: Tensor,
    rows: Tensor,
    order: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    relu: bool = False,
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> Tensor:
    """Returns `tiles.sparse_conv_int8_tiles`; `config` defaults to the layer's default."""
    _, cout, cin = packed_weight.shape
    if config is None:
        config = config_for(cin, cout, rows.shape[1], features.device)
    return launch(
        pad_channels(features),
        packed_weight.contiguous(),
        TileRulebook(*(part.contiguous() for part in (spans, taps, rows, order))),
        scale.contiguous(),
        _contiguous(bias),
        _contiguous(residual),
        residual_scale,
        relu,
        torch.int8 if out_dtype is None else out_dtype,
        config,
    )


def sparse_conv_int8(
    features: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    relu: bool = False,
    out_dtype: torch.dtype | None = None,
    tile_rows: int = DEFAULT_TILE_ROWS,
    config: Config | None = None,
) -> Tensor:
    """Returns `reference.sparse_conv_int8`, bit for bit.

    It packs the weight and cuts the map into tiles on every call, without a synchronization;
    `sparse_conv_int8_tiles` takes both ready made.
    """
    return sparse_conv_int8_tiles(
        features,
        pack_weight(weight),
        *tile_rulebook(neighbors, tile_rows),
        scale,
        bias,
        residual,
        residual_scale,
        relu,
        out_dtype,
        config,
    )
