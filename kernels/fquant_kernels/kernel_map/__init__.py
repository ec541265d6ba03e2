"""Kernel maps: which input voxel meets which output voxel under which kernel offset."""

from fquant_kernels.kernel_map.reference import (
    conv_output_coords,
    kernel_neighbors,
    transpose_neighbors,
    transposed_conv_output_coords,
)
from fquant_kernels.kernel_map.rulebook import TileRulebook, mask_order, tile_rulebook

__all__ = [
    "TileRulebook",
    "conv_output_coords",
    "kernel_neighbors",
    "mask_order",
    "tile_rulebook",
    "transpose_neighbors",
    "transposed_conv_output_coords",
]
