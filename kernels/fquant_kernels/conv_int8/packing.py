"""Weights as the tensor-core kernels read them."""

import torch.nn.functional as F
from torch import Tensor

# 16 int8 channels are one asynchronous copy; a row that is no multiple of it is copied by bytes.
CHANNEL_MULTIPLE = 16


def padded_channels(num_channels: int) -> int:
    """Returns the input channels of a packed weight: the next multiple of 16, at least 16."""
    return max(1, -(-num_channels // CHANNEL_MULTIPLE)) * CHANNEL_MULTIPLE


def pad_channels(features: Tensor) -> Tensor:
    """Returns rows of `padded_channels` channels, the new ones 0; contiguous."""
    missing = padded_channels(features.shape[-1]) - features.shape[-1]
    return (F.pad(features, (0, missing)) if missing else features).contiguous()


def pack_weight(weight: Tensor) -> Tensor:
    """Returns `(Cout, K, Cin)` weights as `(K, Cout, padded_channels(Cin))`, contiguous.

    Example:
        >>> import torch
        >>> pack_weight(torch.ones(8, 27, 5, dtype=torch.int8)).shape
        torch.Size([27, 8, 16])
    """
    return pad_channels(weight.transpose(0, 1))
