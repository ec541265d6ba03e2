"""Kernel maps: which input voxel meets which output voxel under which kernel offset."""

from fquant_kernels.kernel_map.op import (
    conv_output_coords,
    kernel_neighbors,
    transpose_neighbors,
    transposed_conv_output_coords,
)

__all__ = [
    "conv_output_coords",
    "kernel_neighbors",
    "transpose_neighbors",
    "transposed_conv_output_coords",
]
