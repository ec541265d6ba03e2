"""Which ONNX type holds a format's codes."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from fquant.formats import FloatFormat, Format
from fquant.optional import require_package
from fquant.spec import QuantSpec

# (exponent bits, mantissa bits, exponent bias, which codes are not numbers) of ONNX's small floats
_FLOATS = {
    (2, 1, 1, "all"): "FLOAT4E2M1",
    (4, 3, 7, "fn"): "FLOAT8E4M3FN",
    (4, 3, 8, "fnuz"): "FLOAT8E4M3FNUZ",
    (5, 2, 15, "ieee"): "FLOAT8E5M2",
    (5, 2, 16, "fnuz"): "FLOAT8E5M2FNUZ",
}


class OnnxType(NamedTuple):
    """The type of a format's codes in ONNX.

    Attributes:
        data_type: of `onnx_ir.DataType`.
        covers: whether QuantizeLinear to this type saturates where the format does; otherwise what
            goes in has to be clipped.
    """

    data_type: Any
    covers: bool


def onnx_type_of(spec: Format) -> OnnxType:
    """Returns the smallest ONNX type that holds a format's codes.

    Raises:
        ValueError: there is none.

    Example:
        >>> onnx_type_of(fquant.QuantSpec(4)), onnx_type_of(fquant.QuantSpec(7))
        (OnnxType(data_type=INT4, covers=True), OnnxType(data_type=INT8, covers=False))
        >>> onnx_type_of(fquant.E5M2)
        OnnxType(data_type=FLOAT8E5M2, covers=True)
    """
    types = require_package("onnx_ir", "fquant.to_onnx", "onnx").DataType
    if isinstance(spec, QuantSpec):
        bits = next(b for b in (4, 8, 16) if b >= spec.num_bits)
        whole = bits == spec.num_bits and not spec.narrow_range
        return OnnxType(types[f"{'U' if spec.unsigned else ''}INT{bits}"], whole)
    if isinstance(spec, FloatFormat) and spec.subnormals and spec.max is None:
        name = _FLOATS.get((spec.exp, spec.man, spec.exponent_bias, spec.finite))
        if name is not None:
            return OnnxType(types[name], True)
    raise ValueError(f"to_onnx: a format must be one that ONNX has in opset 23, got {spec}.")


def opset_of(specs: Iterable[Format]) -> int:
    """Returns the opset that has the types of some formats: 21, which most runtimes know, or 23.

    Example:
        >>> opset_of([fquant.QuantSpec(), fquant.E4M3]), opset_of([fquant.E2M1])
        (21, 23)
    """
    types = require_package("onnx_ir", "fquant.to_onnx", "onnx").DataType
    return 23 if any(onnx_type_of(s).data_type == types.FLOAT4E2M1 for s in specs) else 21
