"""The op `fquant::sparse_conv_int8_pairs`: the convolution with the pairs of its map listed before.

`sparse_conv_int8` on a CPU lists the pairs of its table on every call, which with 16 channels is a
third of its time. Layers that share a map can do it once.
"""

from typing import Any

import torch
from torch import Tensor

from fquant_kernels import native
from fquant_kernels.checks import require_tensor
from fquant_kernels.conv_int8 import cpu, op
from fquant_kernels.kernel_map.pairs import PairRulebook, num_blocks
from fquant_kernels.library import define_inference_op
from fquant_kernels.registry import offer

_NAME = "fquant::sparse_conv_int8_pairs"


def check_args(
    features: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    splits: Tensor,
    inputs: Tensor,
    rows: Tensor,
    *epilogue: Any,
) -> None:
    """Checks dtypes, shapes and devices; reads no values."""
    op.check_args(features, weight, neighbors, *epilogue)
    num_taps, num_outputs = neighbors.shape
    num_splits = num_blocks(num_outputs) * num_taps + 1
    require_tensor(_NAME, "splits", splits, torch.int64, (num_splits,), features)
    require_tensor(_NAME, "inputs", inputs, torch.int32, ("P",), features)
    require_tensor(_NAME, "rows", rows, torch.uint8, (inputs.shape[0],), features)


def _without_lists(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*arguments[:3], *arguments[6:])


def by_table(*arguments: Any) -> Tensor:
    """Returns the convolution by the table that the pairs were listed from: the definition."""
    return op.sparse_conv_int8(*_without_lists(arguments))


def fake(*arguments: Any) -> Tensor:
    """Returns an empty result."""
    return op.fake(*_without_lists(arguments))


def by_pairs(
    features: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    splits: Tensor,
    inputs: Tensor,
    rows: Tensor,
    *epilogue: Any,
    isa: str | None = None,
) -> Tensor:
    """Returns the same on a CPU, without reading the table."""
    pairs = PairRulebook(splits, inputs, rows)
    return cpu.sparse_conv_int8(features, weight, neighbors, *epilogue, isa=isa, pairs=pairs)


_op = define_inference_op(
    "sparse_conv_int8_pairs(Tensor features, Tensor weight, Tensor neighbors, Tensor splits, "
    "Tensor inputs, Tensor rows, Tensor scale, Tensor? bias=None, Tensor? residual=None, "
    "Tensor? residual_scale=None, bool relu=False, ScalarType? out_dtype=None) -> Tensor",
    check_args,
    by_table,
    fake,
    instead="Train with fake quantization (fquant.fake_quantize around fquant.sparse.sparse_conv).",
)
offer(_op, "cpu", "cpp", check_args, by_pairs, native.why_unavailable, native.describe_isas())


def sparse_conv_int8_pairs(
    features: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    pairs: PairRulebook,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    relu: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns `sparse_conv_int8` of the same arguments, bit for bit; on a CPU, faster.

    Args:
        features: `(N, Cin)` int8; this and all but pairs as for `sparse_conv_int8`.
        weight: `(Cout, K, Cin)` int8.
        neighbors: `(K, M)` int32.
        pairs: `pair_rulebook(neighbors, N)`; that it belongs to neighbors is not checked.
        scale: `(Cout,)` float32.
        bias: `(Cout,)` float32.
        residual: `(M, Cout)` int8.
        residual_scale: 0-d float32.
        relu: whether to clamp at 0 before rounding.
        out_dtype: int8, float16 or float32.

    Raises:
        TypeError, ValueError, RuntimeError: as `sparse_conv_int8`.

    Example:
        >>> from fquant_kernels import pair_rulebook
        >>> features = torch.tensor([[10], [20]], dtype=torch.int8)
        >>> weight = torch.tensor([[[1], [2]]], dtype=torch.int8)
        >>> neighbors = torch.tensor([[-1, 0], [0, 1]], dtype=torch.int32)
        >>> pairs = pair_rulebook(neighbors, num_inputs=2)
        >>> sparse_conv_int8_pairs(features, weight, neighbors, pairs, torch.tensor([0.25])).T
        tensor([[ 5, 12]], dtype=torch.int8)
    """
    return _op(
        features,
        weight,
        neighbors,
        *pairs,
        scale,
        bias,
        residual,
        residual_scale,
        relu,
        out_dtype,
    )
