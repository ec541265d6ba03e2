"""Kernel maps: which input voxel meets which output voxel under which kernel offset."""

from fquant_kernels.kernel_map.op import (
    conv_output_coords,
    kernel_neighbors,
    transpose_neighbors,
    transposed_conv_output_coords,
)
from fquant_kernels.kernel_map.pairs import PairRulebook, pair_rulebook
from fquant_kernels.kernel_map.reference import (
    conv_output_shape,
    linear_keys,
    transposed_conv_output_shape,
)
from fquant_kernels.kernel_map.rulebook import TileRulebook, mask_order, tile_rulebook

__all__ = [
    "PairRulebook",
    "TileRulebook",
    "conv_output_coords",
    "conv_output_shape",
    "kernel_neighbors",
    "linear_keys",
    "mask_order",
    "pair_rulebook",
    "tile_rulebook",
    "transpose_neighbors",
    "transposed_conv_output_coords",
    "transposed_conv_output_shape",
]
