"""The definition of the half-precision sparse convolution, up to the order of its sums."""

import torch
from torch import Tensor


def sparse_conv_half(
    features: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Returns the convolution in float32, rounded once at the end; see `op.sparse_conv_half`."""
    padded = torch.cat([features, features.new_zeros(1, features.shape[1])]).float()
    rows = torch.where(neighbors < 0, features.shape[0], neighbors)
    t = padded.new_zeros(neighbors.shape[1], weight.shape[0])
    for k in range(weight.shape[1]):
        t = t + padded[rows[k]] @ weight[:, k].float().T
    if bias is not None:
        t = t + bias
    if residual is not None:
        t = t + residual.float()
    if relu:
        t = t.clamp(min=0.0)
    return t.to(features.dtype)
