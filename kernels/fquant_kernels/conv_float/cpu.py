"""The CPU path of the float32 sparse convolution."""

import torch
from torch import Tensor

from fquant_kernels import native


def pack_weight(weight: Tensor, isa: str | None = None) -> Tensor:
    """Returns `(Cout, K, Cin)` float32 weights in the order one instruction set reads them."""
    number = native.choose_isa(isa)
    weight = weight.contiguous()
    size = native.library().fquant_packed_bytes(number, 1, *weight.shape)
    packed = torch.empty(size // 4, dtype=torch.float32)
    status = native.library().fquant_pack_float(
        number, weight.data_ptr(), *weight.shape, packed.data_ptr()
    )
    native.raise_for(status, "pack_weight")
    return packed


def sparse_conv_float(
    features: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    bias: Tensor | None = None,
    isa: str | None = None,
) -> Tensor:
    """Returns the convolution as `reference.sparse_conv_float`, on any thread count the same bits.

    Args beyond the reference's:
        isa: one of `native.ISAS`, for tests; chosen by `native.choose_isa` where left out.

    Raises:
        IndexError: an entry of `neighbors` is not below N.
    """
    number = native.choose_isa(isa)
    packed = pack_weight(weight, native.ISAS[number])
    features, neighbors = features.contiguous(), neighbors.contiguous()
    bias = None if bias is None else bias.contiguous()
    num_taps, num_outputs = neighbors.shape
    out = torch.empty((num_outputs, weight.shape[0]), dtype=torch.float32)
    status = native.library().fquant_conv_float(
        number,
        features.data_ptr(),
        *features.shape,
        packed.data_ptr(),
        weight.shape[0],
        neighbors.data_ptr(),
        num_taps,
        num_outputs,
        native.pointer(bias),
        out.data_ptr(),
        native.num_threads(),
    )
    native.raise_for(status, "fquant::sparse_conv_float")
    return out
