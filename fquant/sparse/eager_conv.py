"""Sparse convolution in eager reverse mode: the kernels of inference, and derivatives by the same.

The composition in `fquant.sparse.conv` gathers every tap of every output, absent ones too, and scatters
their derivatives back: on 23,000 LiDAR voxels with 32 channels, ten times the time of what is here. A
convolution is linear in features and in weights, so its derivatives are convolutions and sums of outer
products over the same map:

    d features = conv(d y, weight^T, transposed map),   d weight[:, k] = sum over pairs of d y x^T

and theirs are so again. Only for eager code under autograd or `torch.func.grad`, nested as deep as
one likes; sums differ from the composition's by their order. Under `torch.compile` an
`autograd.Function` gives silently zero gradients.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

import fquant_kernels


def applies_to(features: Tensor, weight: Tensor) -> bool:
    """Whether this is eager float32 code on CPU with no transform but reverse-mode differentiation."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in (features, weight)):
        return False
    stack = get_interpreter_stack() or []
    if any(level.key() != TransformType.Grad for level in stack):
        return False
    plain = [_plain(t) for t in (features, weight)]
    return all(type(t) in (Tensor, torch.nn.Parameter) for t in plain)


def eager_conv(features: Tensor, weight: Tensor, neighbors: Tensor) -> Tensor:
    """Returns `out[m] = sum_k weight[:, k] @ features[neighbors[k, m]]`, differentiable.

    Args:
        features: `(N, Cin)` float32.
        weight: `(Cout, K, Cin)` float32.
        neighbors: `(K, M)` int32, -1 for none; each pair of offset and input at most once.
    """
    back = fquant_kernels.transpose_neighbors(neighbors, features.shape[0])
    return _Conv.apply(features, weight, neighbors, back)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(features: Tensor, weight: Tensor, neighbors: Tensor, back: Tensor) -> Tensor:
        with torch.no_grad():
            return fquant_kernels.sparse_conv_float(
                features.contiguous(), weight.contiguous(), neighbors
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, neighbors, back = ctx.saved_tensors
        wanted, weight_wanted = ctx.needs_input_grad[:2]
        by_features = _Conv.apply(gradient, _swapped(weight), back, neighbors) if wanted else None
        by_weight = (
            _WeightGradient.apply(features, gradient, neighbors, back) if weight_wanted else None
        )
        return by_features, by_weight, None, None


class _WeightGradient(torch.autograd.Function):
    """`out[:, k] = sum over outputs m of gradient[m] (outer) features[neighbors[k, m]]`."""

    @staticmethod
    def forward(features: Tensor, gradient: Tensor, neighbors: Tensor, back: Tensor) -> Tensor:
        taps = []
        for row in neighbors:
            written = (row >= 0).nonzero()[:, 0]
            read = row.index_select(0, written)
            taps.append(gradient.index_select(0, written).T @ features.index_select(0, read))
        return torch.stack(taps, dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        features, gradient, neighbors, back = ctx.saved_tensors
        by_features = _Conv.apply(gradient, _swapped(weight), back, neighbors)
        by_gradient = _Conv.apply(features, weight, neighbors, back)
        return by_features, by_gradient, None, None


def _swapped(weight: Tensor) -> Tensor:
    """Returns `(Cin, K, Cout)`."""
    return weight.permute(2, 1, 0).contiguous()


def _plain(tensor: Tensor) -> Tensor:
    """Returns the tensor inside all wrappers of reverse-mode transforms."""
    while torch._C._functorch.is_gradtrackingtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
