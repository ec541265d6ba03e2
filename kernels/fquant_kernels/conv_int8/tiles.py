"""The op `fquant::sparse_conv_int8_tiles`: the convolution with plan and weight ready made.

`sparse_conv_int8` on a GPU packs its weight and cuts its map into tiles on every call. Layers that
share a map, and weights that do not change, can do both once.
"""

import torch
from torch import Tensor

from fquant_kernels.checks import check_epilogue, require_tensor
from fquant_kernels.conv_int8 import reference
from fquant_kernels.conv_int8.op import MAX_PRODUCTS, OUT_DTYPES
from fquant_kernels.conv_int8.packing import pad_channels, padded_channels
from fquant_kernels.kernel_map.rulebook import TileRulebook, check_tile_rows, neighbors_of_rulebook
from fquant_kernels.library import define_inference_op
from fquant_kernels.triton_support import register_triton

_NAME = "fquant::sparse_conv_int8_tiles"


def check_args(
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
) -> None:
    """Checks dtypes, shapes and devices; reads no values."""
    require_tensor(_NAME, "features", features, torch.int8, ("N", "Cin"), features)
    padded = padded_channels(features.shape[1])
    require_tensor(
        _NAME, "packed_weight", packed_weight, torch.int8, ("K", "Cout", padded), features
    )
    num_taps, cout, _ = packed_weight.shape
    require_tensor(_NAME, "spans", spans, torch.int32, ("T", 2), features)
    require_tensor(_NAME, "rows", rows, torch.int32, ("S", "B"), features)
    check_tile_rows(_NAME, rows.shape[1])
    require_tensor(_NAME, "taps", taps, torch.int32, (rows.shape[0],), features)
    require_tensor(_NAME, "order", order, torch.int32, ("M",), features)
    check_epilogue(_NAME, features, order.shape[0], cout, scale, bias, residual, residual_scale)
    if num_taps * padded > MAX_PRODUCTS:
        raise ValueError(
            f"{_NAME}: K times the padded channels must be at most {MAX_PRODUCTS}, so that int32 "
            f"sums cannot overflow, got {num_taps} * {padded} = {num_taps * padded}."
        )
    if out_dtype is not None and out_dtype not in OUT_DTYPES:
        raise TypeError(f"{_NAME}: out_dtype must be one of {OUT_DTYPES}, got {out_dtype}.")


def reference_of_tiles(
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
) -> Tensor:
    """Returns the convolution by the table that the rulebook was made from."""
    rulebook = TileRulebook(spans, taps, rows, order)
    return reference.sparse_conv_int8(
        pad_channels(features),
        packed_weight.transpose(0, 1),
        neighbors_of_rulebook(rulebook, packed_weight.shape[0]),
        scale,
        bias,
        residual,
        residual_scale,
        relu,
        out_dtype,
    )


def fake(
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
) -> Tensor:
    """Returns an empty result."""
    out_shape = (order.shape[0], packed_weight.shape[1])
    return features.new_empty(out_shape, dtype=torch.int8 if out_dtype is None else out_dtype)


_op = define_inference_op(
    "sparse_conv_int8_tiles(Tensor features, Tensor packed_weight, Tensor spans, Tensor taps, "
    "Tensor rows, Tensor order, Tensor scale, Tensor? bias=None, Tensor? residual=None, "
    "Tensor? residual_scale=None, bool relu=False, ScalarType? out_dtype=None) -> Tensor",
    check_args,
    reference_of_tiles,
    fake,
    instead="Train with fake quantization (fquant.fake_quantize around fquant.sparse.sparse_conv).",
)
register_triton(_op, check_args, "fquant_kernels.conv_int8.cuda_triton", reference_of_tiles)


def sparse_conv_int8_tiles(
    features: Tensor,
    packed_weight: Tensor,
    rulebook: TileRulebook,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    relu: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns `sparse_conv_int8` of the same weight and kernel map, bit for bit.

    Args:
        features: `(N, Cin)` int8.
        packed_weight: `(K, Cout, padded_channels(Cin))` int8, from `pack_weight`.
        rulebook: from `tile_rulebook`, for a table of K taps over N rows; not range-checked.
        scale: as for `sparse_conv_int8`, and so are the others.
        bias: see there.
        residual: see there; `(M, Cout)`, in the order of the table, not of the rulebook's slots.
        residual_scale: see there.
        relu: see there.
        out_dtype: see there.

    Example:
        >>> from fquant_kernels import mask_order, pack_weight, tile_rulebook
        >>> features = torch.tensor([[10], [20]], dtype=torch.int8)
        >>> weight = torch.tensor([[[1], [2]]], dtype=torch.int8)
        >>> neighbors = torch.tensor([[-1, 0], [0, 1]], dtype=torch.int32)
        >>> rulebook = tile_rulebook(neighbors, order=mask_order(neighbors))
        >>> sparse_conv_int8_tiles(features, pack_weight(weight), rulebook, torch.tensor([0.25])).T
        tensor([[ 5, 12]], dtype=torch.int8)
    """
    return _op(
        features,
        packed_weight,
        *rulebook,
        scale,
        bias,
        residual,
        residual_scale,
        relu,
        out_dtype,
    )
