"""What `lower` did, as data and as a table."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fquant.formats import grid_name
from fquant.graph.editor import Editor
from fquant.graph.qdq_ops import Quantization, granularity_of, is_dequantize, quantization_of


@dataclass(frozen=True)
class QuantizedOperand:
    """One quantized operand or result of a layer.

    Attributes:
        name: the quantizer.
        scale: its step, or the smallest and largest of several; empty if computed at run time.
        zero_point: 0, or "run time".
        scheme: the grid and what shares a step, such as "int8 per axis 0".
    """

    name: str
    scale: tuple[float, ...]
    zero_point: int | str
    scheme: str

    @property
    def grid(self) -> str:
        """The scheme, the steps and the zero point, in words."""
        steps = " .. ".join(f"{s:.4g}" for s in self.scale) or "run time"
        return f"{self.scheme} scale {steps} zero {self.zero_point}"

    def __str__(self) -> str:
        return f"{self.name.rpartition('.')[2]} {self.grid}"


@dataclass(frozen=True)
class LayerReport:
    """What became of one operation.

    Attributes:
        site: its name in the plan, `path/op#k`.
        operation: the operations that became one, joined by "+".
        kernel: what serves it; "" if it stays in floating point.
        operands: its quantized operands.
        result: the grid of its result if that stays in integers; None if it is in floating point.
        reason: why it was not lowered, or why its result is in floating point; "" otherwise.
    """

    site: str
    operation: str
    kernel: str
    operands: tuple[QuantizedOperand, ...]
    result: QuantizedOperand | None = None
    reason: str = ""


@dataclass(frozen=True)
class LoweringReport:
    """Every operation that has a quantized operand, in order; printing it gives a table.

    Attributes:
        layers: one entry per operation.
        kept: names of the quantizers whose Q or DQ node is still in the graph.
    """

    layers: tuple[LayerReport, ...]
    kept: tuple[str, ...]

    @property
    def lowered(self) -> tuple[LayerReport, ...]:
        """The operations that run in integers."""
        return tuple(layer for layer in self.layers if layer.kernel)

    def __str__(self) -> str:
        rows = [("layer", "operation", "kernel", "operands -> result; why not")]
        for layer in self.layers:
            rest = ["; ".join(map(str, layer.operands))]
            rest += [] if layer.result is None else [f"-> {layer.result.grid}"]
            rest += [f"[{layer.reason}]"] if layer.reason else []
            kernel = layer.kernel or "float"
            rows.append((layer.site, layer.operation, kernel, " ".join(rest)))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        kept = ", ".join(self.kept) or "none"
        return "\n".join([*lines, f"Q/DQ nodes left: {kept}"])


def describe(editor: Editor, node: Node) -> QuantizedOperand:
    """Returns what a Q or DQ node says."""
    x = quantization_of(node)
    grid = grid_name(x.format)
    per = granularity_of(x.scale.meta["val"].shape, x.input.meta["val"].shape)
    steps: tuple[float, ...] = ()
    if editor.constant(x.scale):
        scale = editor.value(x.scale)
        steps = tuple(dict.fromkeys([scale.min().item(), scale.max().item()]))
    return QuantizedOperand(x.name, steps, _zero_point(editor, x), f"{grid} per {per}")


def operands_of(editor: Editor, node: Node) -> tuple[QuantizedOperand, ...]:
    """Returns the quantized operands of an operation."""
    return tuple(describe(editor, q) for q in quantized_inputs(node))


def quantized_inputs(node: Node) -> list[Node]:
    """Returns the DQ nodes that an operation reads, weights through reshapes."""
    found = []
    for x in node.all_input_nodes:
        source: Any = x
        while source.op == "call_function" and source.target is torch.ops.aten.reshape.default:
            source = source.args[0]
        if is_dequantize(source):
            found.append(source)
    return found


def _zero_point(editor: Editor, x: Quantization) -> int | str:
    if x.zero_point is None:
        return 0
    if not editor.constant(x.zero_point):
        return "run time"
    values = editor.value(x.zero_point)
    return int(values) if values.numel() == 1 else "several"
