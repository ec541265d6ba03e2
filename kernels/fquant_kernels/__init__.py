"""Kernels for sparse convolution and calibration, as `torch.library` ops: tensors in, tensors out.

Each op is a folder: `reference.py` is the definition, in plain torch, for any device; `op.py`
checks arguments and registers it. This package knows nothing of records, trees or modules.
"""

from fquant_kernels.abs_histogram import abs_histogram
from fquant_kernels.conv_float import sparse_conv_float
from fquant_kernels.conv_half import sparse_conv_half
from fquant_kernels.conv_int8 import (
    pack_weight,
    pack_weight_for,
    sparse_conv_int8,
    sparse_conv_int8_packed,
    sparse_conv_int8_pairs,
    sparse_conv_int8_tiles,
)
from fquant_kernels.doctor import Check, check_neighbors, self_test
from fquant_kernels.kernel_map import (
    PairRulebook,
    TileRulebook,
    conv_output_coords,
    kernel_neighbors,
    mask_order,
    pair_rulebook,
    tile_rulebook,
    transpose_neighbors,
    transposed_conv_output_coords,
)
from fquant_kernels.registry import Backend, backends

__all__ = [
    "Backend",
    "Check",
    "PairRulebook",
    "TileRulebook",
    "abs_histogram",
    "backends",
    "check_neighbors",
    "conv_output_coords",
    "kernel_neighbors",
    "mask_order",
    "pack_weight",
    "pack_weight_for",
    "pair_rulebook",
    "self_test",
    "sparse_conv_float",
    "sparse_conv_half",
    "sparse_conv_int8",
    "sparse_conv_int8_packed",
    "sparse_conv_int8_pairs",
    "sparse_conv_int8_tiles",
    "tile_rulebook",
    "transpose_neighbors",
    "transposed_conv_output_coords",
]
