"""The op `fquant::sparse_conv_float`: argument checks, fake impl, registration."""

import torch
from torch import Tensor

from fquant_kernels import native
from fquant_kernels.conv_float import cpu, reference
from fquant_kernels.library import define_inference_op
from fquant_kernels.registry import offer


def check_args(
    features: Tensor, weight: Tensor, neighbors: Tensor, bias: Tensor | None = None
) -> None:
    """Checks dtypes, shapes and devices; reads no values."""
    where = "fquant::sparse_conv_float:"
    wanted = [("features", features, torch.float32, 2), ("weight", weight, torch.float32, 3)]
    wanted.append(("neighbors", neighbors, torch.int32, 2))
    if bias is not None:
        wanted.append(("bias", bias, torch.float32, 1))
    for name, tensor, dtype, ndim in wanted:
        if tensor.dtype != dtype:
            raise TypeError(f"{where} {name} must be {dtype}, got {tensor.dtype}.")
        if tensor.ndim != ndim:
            raise ValueError(f"{where} {name} must have {ndim} axes, got {tuple(tensor.shape)}.")
        if tensor.device != features.device:
            raise ValueError(
                f"{where} {name} must be on {features.device} like features, got {tensor.device}."
            )
    if weight.shape[1] != neighbors.shape[0] or weight.shape[2] != features.shape[1]:
        raise ValueError(
            f"{where} weight must be (Cout, K, Cin) with K = {neighbors.shape[0]} and "
            f"Cin = {features.shape[1]}, got {tuple(weight.shape)}."
        )
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{where} bias must be (Cout,) = ({weight.shape[0]},), got {tuple(bias.shape)}."
        )


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
