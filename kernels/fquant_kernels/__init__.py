"""Integer kernels for sparse convolution, as `torch.library` ops: tensors and ints in, tensors out.

Each op is a folder: `reference.py` is the definition, in plain torch, for any device; `op.py`
checks arguments and registers it. This package knows nothing of records, trees or modules.
"""

from fquant_kernels.backends import Backend, backends
from fquant_kernels.conv_int8 import sparse_conv_int8
from fquant_kernels.kernel_map import (
    conv_output_coords,
    kernel_neighbors,
    transpose_neighbors,
    transposed_conv_output_coords,
)

__all__ = [
    "Backend",
    "backends",
    "conv_output_coords",
    "kernel_neighbors",
    "sparse_conv_int8",
    "transpose_neighbors",
    "transposed_conv_output_coords",
]
