"""Half-precision sparse convolution, for the layers that stay in floating point."""

from fquant_kernels.conv_half.op import sparse_conv_half

__all__ = ["sparse_conv_half"]
