"""int8 sparse convolution with the fused requantizing epilogue."""

from fquant_kernels.conv_int8.op import sparse_conv_int8

__all__ = ["sparse_conv_int8"]
