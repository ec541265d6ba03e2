"""The two nodes of a Q/DQ graph as ONNX operators.

QuantizeLinear computes `saturate(round_half_even(x / scale) + zero_point)`, as `fquant.quantize` does,
where the type it saturates to has the format's range. Elsewhere x is clipped to
`[(q_min - zero_point) * scale, (q_max - zero_point) * scale]` before, which gives the same integers.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from fquant.formats import Format
from fquant.graph.onnx.types import onnx_type_of
from fquant.graph.qdq_ops import dequantize, format_from_text, quantize
from fquant.optional import require_package

QUANTIZER = "fquant.quantizer"  # key of the metadata of both operators: the plan's name for them


def qdq_translations(inside: Collection[str]) -> dict[Any, Callable[..., Any]]:
    """Returns the functions that emit the operators, for `torch.onnx.export`'s translation table.

    Args:
        inside: quantizers whose inputs are known to stay within the format's range.
    """
    types = require_package("onnx_ir", "fquant.to_onnx", "onnx").DataType

    def emit_quantize(x: Any, scale: Any, zero_point: Any, format: str, name: str) -> Any:
        spec = format_from_text(format)
        layout = _Layout(x.shape, scale)
        if x.dtype != types.FLOAT:
            x = layout.op.Cast(x, to=types.FLOAT)
        if not onnx_type_of(spec).covers and name not in inside:
            x = layout.clipped(x, scale, zero_point, spec)
        data_type = onnx_type_of(spec).data_type
        operands = layout.operands(x, scale, zero_point, data_type)
        q = layout.op.QuantizeLinear(x, *operands, output_dtype=data_type, **layout.attributes)
        q.producer().metadata_props[QUANTIZER] = name
        return q

    def emit_dequantize(
        q: Any, scale: Any, zero_point: Any, format: str, dtype: int, name: str
    ) -> Any:
        layout = _Layout(q.shape, scale)
        data_type = onnx_type_of(format_from_text(format)).data_type
        operands = layout.operands(q, scale, zero_point, data_type)
        if q.producer() is None or q.producer().op_type != "QuantizeLinear":
            q = layout.op.Cast(q, to=data_type)  # `with_typed_codes` takes it out
        y = layout.op.DequantizeLinear(q, *operands, **layout.attributes)
        y.producer().metadata_props[QUANTIZER] = name
        return y if dtype == types.FLOAT else layout.op.Cast(y, to=dtype)

    aten = torch.ops.aten
    return {
        quantize: emit_quantize,
        dequantize: emit_dequantize,
        aten.amax.default: _emit_reduction("ReduceMax"),
        aten.amin.default: _emit_reduction("ReduceMin"),
    }


def _emit_reduction(name: str) -> Callable[..., Any]:
    """The largest or least of all elements too, which onnxscript 0.7's own does not translate."""

    def emit(x: Any, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
        op = require_package("onnxscript", "fquant.to_onnx", "onnx").opset21
        axes = op.Constant(value_ints=list(dim)) if dim else None
        return getattr(op, name)(x, axes, keepdims=int(keepdim))

    return emit


class _Layout:
    """How a scale meets a tensor (`fquant.granularity`), in the operators' terms.

    The operators know a scale per tensor, per index of one axis, or per block along one axis; all
    other axes then have to be there in full, so the scale is repeated along them.

    Attributes:
        op: onnxscript's operators.
        attributes: "axis" and "block_size", as far as they apply.
    """

    def __init__(self, shape: Sequence[Any], scale: Any) -> None:
        self.op = require_package("onnxscript", "fquant.to_onnx", "onnx").opset21
        self.want = list(shape)
        self.have = [1] * (len(self.want) - len(scale.shape)) + list(scale.shape)
        axes = range(len(self.want))
        several = [a for a in axes if self.have[a] != 1]
        partial = [
            a for a in axes if self.have[a] != self.want[a] and isinstance(self.want[a], int)
        ]
        blocked = [a for a in partial if a in several]
        self.attributes: dict[str, int] = {}
        if several and (blocked or len(several) > 1):
            axis = (blocked or partial or axes)[-1]
            self.attributes = {"axis": axis, "block_size": self.want[axis] // self.have[axis]}
        elif several:
            self.attributes = {"axis": several[0]}

    def operands(self, x: Any, scale: Any, zero_point: Any, data_type: Any) -> list[Any]:
        """Returns the scale, and the zero point if there is one, as the operators take them."""
        if zero_point is None:
            return [self._operand(x, scale)]
        return [
            self._operand(x, scale),
            self.op.Cast(self._operand(x, zero_point), to=data_type),
        ]

    def clipped(self, x: Any, scale: Any, zero_point: Any, spec: Format) -> Any:
        """Returns x within the format's range."""
        op = self.op
        shaped = self._repeated if self.attributes else self._operand
        bounds = [op.Constant(value_float=float(b)) for b in (spec.q_min, spec.q_max)]
        if zero_point is not None:
            shift = op.Cast(shaped(x, zero_point), to=1)  # FLOAT
            bounds = [op.Sub(bound, shift) for bound in bounds]
        low, high = (op.Mul(bound, shaped(x, scale)) for bound in bounds)
        if self.attributes:
            return op.Min(op.Max(x, low), high)
        return op.Clip(x, low, high)  # which takes no tensors

    def _operand(self, x: Any, value: Any) -> Any:
        if "block_size" in self.attributes:
            return self._repeated(x, value, (self.attributes["axis"],))
        if self.attributes:
            return self.op.Reshape(value, self.op.Constant(value_ints=[-1]))
        return self.op.Squeeze(value) if len(value.shape) else value

    def _repeated(self, x: Any, value: Any, but: tuple[int, ...] = ()) -> Any:
        """Returns a value of the scale's shape repeated to x's shape, but for some axes.

        Without exceptions, axes of size 1 stay: they broadcast.
        """
        op = self.op
        have = list(self.have)
        for axis, (old, new) in enumerate(zip(self.have, self.want, strict=True)):
            if axis in but or old in (1, new):
                continue
            apart = [*have[: axis + 1], new // old, *have[axis + 1 :]]
            have[axis] = new
            value = op.Unsqueeze(value, op.Constant(value_ints=[axis + 1]))
            value = op.Expand(value, op.Constant(value_ints=apart))
            value = op.Reshape(value, op.Constant(value_ints=have))
        for axis in but:
            if have != [*self.want[:axis], have[axis], *self.want[axis + 1 :]]:
                here = op.Constant(value_ints=[have[axis]])
                sides = [op.Shape(x, start=0, end=axis), here, op.Shape(x, start=axis + 1)]
                value = op.Expand(value, op.Concat(*sides, axis=0))
        return value
