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
            norm = f"{layer.name}.norm"
            normed = any(name.startswith(f"{norm}.") for name in state)
            weight, bias = fold(state, layer.name, norm if normed else None, EPS)
            folded[f"{layer.name}.weight"], folded[f"{layer.name}.bias"] = weight, bias
    return folded


def fold(
    state: Mapping[str, Tensor], conv: str, norm: str | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns (weight, bias) of the layer at path `conv`, with the batch norm at path `norm`, if any.

    Raises:
        ValueError: state lacks the weight, or the norm's statistics.
    """
    needed = [f"{conv}.weight", *([] if norm is None else [f"{norm}.running_mean"])]
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(
            f"fold: state must have parameters and buffers, model.state_dict(), lacks {missing}."
        )
    weight = state[f"{conv}.weight"]
    bias = state.get(f"{conv}.bias", weight.new_zeros(weight.shape[0]))
    if norm is None:
        return weight, bias
    factor = torch.rsqrt(state[f"{norm}.running_var"] + eps)
    if f"{norm}.weight" in state:  # not with affine=False
        factor = factor * state[f"{norm}.weight"]
    bias = (bias - state[f"{norm}.running_mean"]) * factor
    if f"{norm}.bias" in state:
        bias = bias + state[f"{norm}.bias"]
    return weight * factor.view(-1, *[1] * (weight.ndim - 1)), bias
