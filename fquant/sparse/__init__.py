"""Sparse tensors: point clouds and sparse images as records, convolved by pure functions.

kernel_map = subm_map(x, kernel_size=3)                      once per geometry, outside compile
y = subm_conv(x, weight, bias, kernel_map=kernel_map)        float, under any torch transform
y = sparse_conv_int8(x, weight, bias, kernel_map=...)        int8, fused, no derivative

`fquant.sparse.nn` has the same as modules, `fquant.sparse.models` whole networks.
"""

from fquant.sparse.capacity import pad_map, pad_to_capacity, valid_count, without_padding
from fquant.sparse.combine import add_features, join_features, sparse_add, union_maps
from fquant.sparse.conv import (
    sparse_conv,
    sparse_conv_transpose,
    sparse_inverse_conv,
    subm_conv,
)
from fquant.sparse.geometry import Geometry
from fquant.sparse.int8 import sparse_conv_int8
from fquant.sparse.kernel_map import (
    KernelMap,
    build_map,
    conv_map,
    subm_map,
    transpose_map,
    transposed_conv_map,
    with_pairs,
)
from fquant.sparse.norm import batch_norm
from fquant.sparse.points import VoxelLimitWarning, from_points
from fquant.sparse.pool import avg_pool, global_avg_pool, global_max_pool, max_pool
from fquant.sparse.prune import find_cells, prune
from fquant.sparse.sync_norm import sync_batch_norm
from fquant.sparse.tensor import SparseTensor

__all__ = [
    "Geometry",
    "KernelMap",
    "SparseTensor",
    "VoxelLimitWarning",
    "add_features",
    "avg_pool",
    "batch_norm",
    "build_map",
    "conv_map",
    "find_cells",
    "from_points",
    "global_avg_pool",
    "global_max_pool",
    "join_features",
    "max_pool",
    "pad_map",
    "pad_to_capacity",
    "prune",
    "sparse_add",
    "sparse_conv",
    "sparse_conv_int8",
    "sparse_conv_transpose",
    "sparse_inverse_conv",
    "subm_conv",
    "subm_map",
    "sync_batch_norm",
    "transpose_map",
    "transposed_conv_map",
    "union_maps",
    "valid_count",
    "with_pairs",
    "without_padding",
]
