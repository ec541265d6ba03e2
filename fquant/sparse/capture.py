"""Sparse convolution and pooling as single nodes of a captured graph.

`fquant::sparse_conv` and `fquant::sparse_max_pool` are names for the tensor operations that compute
them; they are called by those names only where a graph is captured to be matched (`capturing`).
"""

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad

import fquant_kernels
from fquant.interception.stack import capturing, opaque
from fquant.sparse import eager_conv
from fquant_kernels.library import define_composite_op


@opaque
def gather_neighbors(features: Tensor, neighbors: Tensor, absent: float) -> Tensor:
    """Returns `(M, K, C)`: the feature row each output reads at each offset, `absent` where none.

    `torch.embedding` gathers twice as fast as indexing does, and its derivative skips absent rows.
    """
    taps, outputs = neighbors.shape
    if outputs == 0:  # the second derivative of an embedding of nothing fails in a reshape
        return features[:0, None].expand(-1, taps, -1)
    absent_row = features.shape[0]
    padded = torch.cat([features, features.new_full((1, features.shape[1]), absent)])
    rows = torch.where(neighbors < 0, absent_row, neighbors).T.contiguous()
    return torch.embedding(padded, rows, absent_row)


def fast_kernel_serves(features: Tensor) -> bool:
    """Whether a float convolution runs as the inference op: float32 on CPU, and no derivative.

    That is under `torch.no_grad` or `inference_mode`, outside of `torch.func` transforms,
    forward-mode differentiation and `torch.export`, where plain operations are what is wanted.
    """
    if torch.is_grad_enabled() or features.dtype != torch.float32 or features.device.type != "cpu":
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return forward_ad._current_level < 0 and torch._C._functorch.peek_interpreter_stack() is None


def _conv(features: Tensor, weight: Tensor, neighbors: Tensor, bias: Tensor | None) -> Tensor:
    if fast_kernel_serves(features):
        return fquant_kernels.sparse_conv_float(features, weight, neighbors, bias)
    if eager_conv.applies_to(features, weight):
        y = eager_conv.eager_conv(features, weight, neighbors)
    else:
        gathered = gather_neighbors(features, neighbors, 0.0)  # (M, K, Cin)
        y = gathered.flatten(1) @ weight.flatten(1).T
    return y if bias is None else y + bias


def _max_pool(features: Tensor, neighbors: Tensor) -> Tensor:
    lowest = float("-inf")
    if not features.is_floating_point():
        lowest = torch.iinfo(features.dtype).min
    if torch.is_grad_enabled() and features.is_floating_point():
        return gather_neighbors(features, neighbors, lowest).max(dim=1).values
    padded = torch.cat([features, features.new_full((1, features.shape[1]), lowest)])
    taps = torch.where(neighbors < 0, features.shape[0], neighbors).unbind()
    return functools.reduce(torch.maximum, (padded.index_select(0, tap) for tap in taps))


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


@opaque
def window_max(features: Tensor, neighbors: Tensor) -> Tensor:
    """Returns `(M, C)`: the largest of the neighbors that are there; floats or integers."""
    return (_max_pool_op if capturing() else _max_pool)(features, neighbors)
