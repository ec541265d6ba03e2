"""Sparse convolution and pooling as single nodes of a captured graph.

`fquant::sparse_conv` and `fquant::sparse_max_pool` are names for the tensor operations that compute
them; they are called by those names only where a graph is captured to be matched (`capturing`).
"""

import torch
from torch import Tensor

from fquant.interception.stack import capturing
from fquant_kernels.library import define_composite_op


def gather_neighbors(features: Tensor, neighbors: Tensor, absent: float) -> Tensor:
    """Returns `(K, M, C)`: the feature row each output reads at each offset, `absent` where none."""
    padded = torch.cat([features, features.new_full((1, features.shape[1]), absent)])
    return padded[torch.where(neighbors < 0, features.shape[0], neighbors)]


def _conv(features: Tensor, weight: Tensor, neighbors: Tensor, bias: Tensor | None) -> Tensor:
    gathered = gather_neighbors(features, neighbors, 0.0)  # (K, M, Cin)
    y = torch.einsum("kmi,oki->mo", gathered, weight)
    return y if bias is None else y + bias


def _max_pool(features: Tensor, neighbors: Tensor) -> Tensor:
    lowest = float("-inf")
    if not features.is_floating_point():
        lowest = torch.iinfo(features.dtype).min
    return gather_neighbors(features, neighbors, lowest).max(dim=0).values


_conv_op = define_composite_op(
    "sparse_conv(Tensor features, Tensor weight, Tensor neighbors, Tensor? bias) -> Tensor", _conv
)
_max_pool_op = define_composite_op(
    "sparse_max_pool(Tensor features, Tensor neighbors) -> Tensor", _max_pool
)


def conv(features: Tensor, weight: Tensor, neighbors: Tensor, bias: Tensor | None) -> Tensor:
    """Returns `(M, Cout)` sums: gather the neighbors, then one matrix product.

    Args:
        features: `(N, Cin)`.
        weight: `(Cout, K, Cin)`.
        neighbors: `(K, M)`, -1 for absent.
        bias: `(Cout,)` or None.
    """
    return (_conv_op if capturing() else _conv)(features, weight, neighbors, bias)


def window_max(features: Tensor, neighbors: Tensor) -> Tensor:
    """Returns `(M, C)`: the largest of the neighbors that are there; floats or integers."""
    return (_max_pool_op if capturing() else _max_pool)(features, neighbors)
