"""float32 sparse convolution for inference."""

from fquant_kernels.conv_float.op import sparse_conv_float

__all__ = ["sparse_conv_float"]
