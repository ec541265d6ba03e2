"""The definition of the float32 sparse convolution, up to the order of summation."""

import torch
from torch import Tensor


def sparse_conv_float(
    features: Tensor, weight: Tensor, neighbors: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Returns `sum_k features[neighbors[k]] @ weight[:, k].T + bias`, absent rows as zeros."""
    num_inputs, num_outputs = features.shape[0], neighbors.shape[1]
    padded = torch.cat([features, features.new_zeros(1, features.shape[1])])
    rows = torch.where(neighbors < 0, num_inputs, neighbors)
    out = features.new_zeros(num_outputs, weight.shape[0])
    for k in range(weight.shape[1]):
        out = out + padded[rows[k]] @ weight[:, k].T
    return out if bias is None else out + bias
