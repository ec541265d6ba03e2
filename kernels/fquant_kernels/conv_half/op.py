"""The op `fquant::sparse_conv_half`: argument checks, fake impl, registration."""

import torch
from torch import Tensor

from fquant_kernels.checks import require_tensor
from fquant_kernels.conv_half import reference
from fquant_kernels.library import define_inference_op
from fquant_kernels.triton_support import register_triton

DTYPES = (torch.float16, torch.bfloat16)
_NAME = "fquant::sparse_conv_half"


def check_args(
    features: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> None:
    """Checks dtypes, shapes and devices; reads no values."""
    if features.dtype not in DTYPES:
        raise TypeError(f"{_NAME}: features must be one of {DTYPES}, got {features.dtype}.")
    require_tensor(_NAME, "features", features, features.dtype, ("N", "Cin"), features)
    require_tensor(
        _NAME, "weight", weight, features.dtype, ("Cout", "K", features.shape[1]), features
    )
    cout, num_taps, _ = weight.shape
    require_tensor(_NAME, "neighbors", neighbors, torch.int32, (num_taps, "M"), features)
    if bias is not None:
        require_tensor(_NAME, "bias", bias, torch.float32, (cout,), features)
    if residual is not None:
        require_tensor(
            _NAME, "residual", residual, features.dtype, (neighbors.shape[1], cout), features
        )


def fake(
    features: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Returns an empty result."""
    return features.new_empty(neighbors.shape[1], weight.shape[0])


_op = define_inference_op(
    "sparse_conv_half(Tensor features, Tensor weight, Tensor neighbors, Tensor? bias=None, "
    "Tensor? residual=None, bool relu=False) -> Tensor",
    check_args,
    reference.sparse_conv_half,
    fake,
    instead="Train with fquant.sparse.sparse_conv.",
)
register_triton(_op, check_args, "fquant_kernels.conv_half.cuda_triton", reference.sparse_conv_half)


def sparse_conv_half(
    features: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Returns the float16 or bfloat16 sparse convolution, for inference, `(M, Cout)`.

    `relu(sum_k sum_c features[neighbors[k, m], c] * weight[o, k, c] + bias[o] + residual[m, o])`,
    all in float32 and rounded once at the end. The order of the sum is the backend's, so backends
    agree to float32 rounding, not bit for bit.

    Args:
        features: `(N, Cin)` float16 or bfloat16.
        weight: `(Cout, K, Cin)`, the same dtype.
        neighbors: `(K, M)` int32, -1 for absent; not range-checked.
        bias: `(Cout,)` float32.
        residual: `(M, Cout)`, the dtype of the features.
        relu: whether to clamp at 0.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape or device is not as above.
        RuntimeError: a derivative is asked for.

    Example:
        >>> features = torch.tensor([[1.0], [2.0]], dtype=torch.float16)
        >>> weight = torch.tensor([[[1.0], [0.5]]], dtype=torch.float16)
        >>> neighbors = torch.tensor([[-1, 0], [0, 1]], dtype=torch.int32)
        >>> sparse_conv_half(features, weight, neighbors).T
        tensor([[0.5000, 2.0000]], dtype=torch.float16)
    """
    return _op(features, weight, neighbors, bias, residual, relu)
