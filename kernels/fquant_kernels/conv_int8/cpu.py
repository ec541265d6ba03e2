"""The CPU path of the int8 sparse convolution: packed weights and the compiled kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fquant_kernels import native
from fquant_kernels.kernel_map.pairs import PairRulebook

_OUT_TYPES = {torch.int8: 0, torch.float16: 1, torch.float32: 2}


def pack_weight(weight: Tensor, isa: str | None = None) -> Tensor:
    """Returns the weights in the order one instruction set reads them, 1-d uint8.

    vpdpbusd multiplies unsigned by signed bytes. Inputs of which none is negative are its unsigned
    side; others are its signed one, and the kernel then takes weights as `w + 128` and takes
    `128 * sum(inputs)` off again. For AVX2 the weights are there twice, as int16 for inputs of both
    signs and as bytes for inputs of which none is negative. Channels are padded with zeros to whole
    vectors.

    Args:
        weight: `(Cout, K, Cin)` int8.
        isa: one of `native.ISAS`; chosen as for the convolution where left out.
    """
    number = native.choose_isa(isa)
    weight = weight.contiguous()
    size = native.library().fquant_packed_bytes(number, 0, *weight.shape)
    packed = torch.empty(size, dtype=torch.uint8)
    status = native.library().fquant_pack_int8(
        number, weight.data_ptr(), *weight.shape, packed.data_ptr()
    )
    native.raise_for(status, "pack_weight")
    return packed


def sparse_conv_int8(
    features: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    relu: bool = False,
    out_dtype: torch.dtype | None = None,
    *,
    isa: str | None = None,
    pairs: PairRulebook | None = None,
) -> Tensor:
    """Returns the convolution as `reference.sparse_conv_int8`, bit for bit, on any thread count.

    Args beyond the reference's:
        pairs: `pair_rulebook(neighbors, N)`, which is then read in place of the table.
        isa: one of `native.ISAS`, for tests; chosen by `native.choose_isa` where left out.

    Raises:
        IndexError: an entry of `neighbors` is not below N.
    """
    number = native.choose_isa(isa)
    packed = pack_weight(weight, native.ISAS[number])
    return convolve_packed(
        features,
        packed,
        (weight.shape[0], weight.shape[1]),
        native.ISAS[number],
        neighbors,
        scale,
        bias,
        residual,
        residual_scale,
        relu,
        out_dtype,
        pairs,
    )


def convolve_packed(
    features: Tensor,
    packed: Tensor,
    weight_shape: Sequence[int],
    isa: str,
    neighbors: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    relu: bool = False,
    out_dtype: torch.dtype | None = None,
    pairs: PairRulebook | None = None,
) -> Tensor:
    """Returns the convolution with weights that `pack_weight(weight, isa)` made.

    Args beyond the reference's:
        packed: 1-d uint8.
        weight_shape: `(Cout, K)` of the weight that was packed.
        isa: what it was packed for.
        pairs: as for `sparse_conv_int8`.
    """
    out_dtype = torch.int8 if out_dtype is None else out_dtype
    features, neighbors, scale = (t.contiguous() for t in (features, neighbors, scale))
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    num_taps, num_outputs = neighbors.shape
    lists = () if pairs is None else tuple(t.contiguous() for t in pairs)  # alive during the call
    out = torch.empty((num_outputs, weight_shape[0]), dtype=out_dtype)
    status = native.library().fquant_conv_int8(
        native.choose_isa(isa),
        features.data_ptr(),
        *features.shape,
        packed.data_ptr(),
        weight_shape[0],
        neighbors.data_ptr(),
        *((t.data_ptr() for t in lists) if lists else (None,) * 3),
        num_taps,
        num_outputs,
        scale.data_ptr(),
        native.pointer(bias),
        native.pointer(residual),
        0.0 if residual_scale is None else residual_scale.item(),
        relu,
        _OUT_TYPES[out_dtype],
        out.data_ptr(),
        native.num_threads(),
    )
    native.raise_for(status, "fquant::sparse_conv_int8")
    return out
