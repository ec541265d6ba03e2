"""Batch norm of sparse networks: folded into the convolution before it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fquant.sparse_network.layer import Layer

EPS = 1e-5  # of torch.nn.BatchNorm1d, which SparseNetwork uses


def fold_network(layers: Sequence[Layer], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parameters of `SparseNetwork(layers, batch_norm=False)` that compute the same.

        factor = gamma / sqrt(running_var + 1e-5)
        weight' = weight * factor,    bias' = beta - running_mean * factor

    What `fquant.fold_batch_norm` does for torch's dense layers. Layers without a batch norm pass as
    they are, a missing bias as zeros. Differentiable.

    Args:
        layers: the network.
        state: parameters and buffers by name.

    Example:
        >>> layers = (Layer("a", "subm", (1, 2), 1), Layer("b", "subm", (2, 1), 1))
        >>> trained = fquant.sparse_network.SparseNetwork(layers, axes=1).state_dict()
        >>> sorted(fold_network(layers, trained))
        ['a.bias', 'a.weight', 'b.bias', 'b.weight']
    """
    folded: dict[str, Tensor] = {}
    for layer in layers:
        if f"{layer.name}.weight" in state:
            weight, bias = fold(state, layer.name, f"{layer.name}.norm", EPS)
            folded[f"{layer.name}.weight"], folded[f"{layer.name}.bias"] = weight, bias
    return folded


def fold(
    state: Mapping[str, Tensor], conv: str, norm: str | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns (weight, bias) of the layer at path `conv`, with the batch norm at path `norm`, if any."""
    weight = state[f"{conv}.weight"]
    bias = state.get(f"{conv}.bias", weight.new_zeros(weight.shape[0]))
    if norm is None or f"{norm}.weight" not in state:
        return weight, bias
    factor = state[f"{norm}.weight"] * torch.rsqrt(state[f"{norm}.running_var"] + eps)
    bias = state[f"{norm}.bias"] + (bias - state[f"{norm}.running_mean"]) * factor
    return weight * factor.view(-1, *[1] * (weight.ndim - 1)), bias
