"""int8 sparse convolution with the fused requantizing epilogue."""

from fquant_kernels.conv_int8.op import sparse_conv_int8
from fquant_kernels.conv_int8.packed import pack_weight_for, sparse_conv_int8_packed
from fquant_kernels.conv_int8.packing import pack_weight
from fquant_kernels.conv_int8.pairs import sparse_conv_int8_pairs
from fquant_kernels.conv_int8.tiles import sparse_conv_int8_tiles

__all__ = [
    "pack_weight",
    "pack_weight_for",
    "sparse_conv_int8",
    "sparse_conv_int8_packed",
    "sparse_conv_int8_pairs",
    "sparse_conv_int8_tiles",
]
