"""The op `fquant::sparse_conv_float`: argument checks, fake impl, registration."""

import torch
from torch import Tensor

from fquant_kernels import native
from fquant_kernels.checks import require_tensor
from fquant_kernels.conv_float import cpu, reference
from fquant_kernels.library import define_inference_op
from fquant_kernels.registry import offer

_NAME = "fquant::sparse_conv_float"


def check_args(
    features: Tensor, weight: Tensor, neighbors: Tensor, bias: Tensor | None = None
) -> None:
    """Checks dtypes, shapes and devices; reads no values."""
    require_tensor(_NAME, "features", features, torch.float32, ("N", "Cin"), features)
    expected = ("Cout", "K", features.shape[1])
    require_tensor(_NAME, "weight", weight, torch.float32, expected, features)
    num_out_channels, num_taps, _ = weight.shape
    require_tensor(_NAME, "neighbors", neighbors, torch.int32, (num_taps, "M"), features)
    if bias is not None:
        require_tensor(_NAME, "bias", bias, torch.float32, (num_out_channels,), features)


def fake(features: Tensor, weight: Tensor, neighbors: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns an empty result."""
    return features.new_empty((neighbors.shape[1], weight.shape[0]))


_op = define_inference_op(
    "sparse_conv_float(Tensor features, Tensor weight, Tensor neighbors, Tensor? bias=None) "
    "-> Tensor",
    check_args,
    reference.sparse_conv_float,
    fake,
    instead="It is for inference: train with the sparse convolution of plain tensor operations.",
)
offer(
    _op,
    "cpu",
    "cpp",
    check_args,
    cpu.sparse_conv_float,
    native.why_unavailable,
    native.describe_isas(),
)


def sparse_conv_float(
    features: Tensor, weight: Tensor, neighbors: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Returns the float32 sparse convolution, for inference: it has no derivative.

    `out[m, o] = sum_k sum_c features[neighbors[k, m], c] * weight[o, k, c] + bias[o]`, in an order
    of summation that depends on the backend, but not on the number of threads.

    Args:
        features: `(N, Cin)` float32, the input rows; N may be 0.
        weight: `(Cout, K, Cin)` float32: KRSC with the kernel axes flattened.
        neighbors: `(K, M)` int32 kernel map (`kernel_neighbors`), -1 for absent, below N.
        bias: `(Cout,)` float32.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape or device is not as above.
        IndexError: an entry of neighbors is N or more (checked on CPU only: there it is free).
        RuntimeError: a derivative is asked for.

    Example:
        >>> features = torch.tensor([[1.0], [2.0]])
        >>> weight = torch.tensor([[[1.0], [10.0]]])     # two taps, one channel
        >>> neighbors = torch.tensor([[-1, 0], [0, 1]], dtype=torch.int32)
        >>> sparse_conv_float(features, weight, neighbors).T
        tensor([[10., 21.]])
    """
    result: Tensor = _op(features, weight, neighbors, bias)
    return result
