"""`lower`: a Q/DQ program -> one whose matched layers are integer ops."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch.export import ExportedProgram
from torch.fx import Node

from fquant.graph import qdq_ops
from fquant.graph.editor import Editor, require_program
from fquant.graph.integers import label_quantizers
from fquant.graph.kernels import DEFAULT_TABLE
from fquant.graph.pattern import Lowering, NotLowered, Pattern, find_pattern, why_not_int8
from fquant.graph.qdq_ops import is_quantize, quantization_of
from fquant.graph.report import (
    LayerReport,
    LoweringReport,
    describe,
    operands_of,
    quantized_inputs,
)
from fquant.graph.tidy import SUNK, tidy

MERGE, KEEP = "merge", "keep"


class Lowered(NamedTuple):
    """What `lower` returns.

    Attributes:
        program: runs, compiles, is exported and saved like any other.
        report: what became of each layer.
    """

    program: ExportedProgram
    report: LoweringReport


def lower(
    program: ExportedProgram,
    table: Sequence[Lowering] = DEFAULT_TABLE,
    *,
    edges: Mapping[str, str] | None = None,
) -> Lowered:
    """Returns a Q/DQ program with its layers in integers, and a report.

    A layer is a float operation between DQ and Q nodes with what follows it: batch norm, a residual
    sum, ReLU or another clamp. The table says which op takes its place; the arithmetic of those that
    come with fquant is that of `fquant_kernels.sparse_conv_int8`. What matches nothing stays in floating
    point, with its Q and DQ nodes. Values are those of the Q/DQ program but for sums that fall next to
    a tie, where float sums round and integer sums do not: one step, rarely.

    The program that comes back runs on any machine; `prepack` makes it faster on this one.

    Args:
        program: from `export_qdq`; not written.
        table: in order of precedence; one's own lines go before DEFAULT_TABLE's.
        edges: `{regular expression: "merge" | "keep"}` on names of quantizers, the first that matches
            decides, merge by default. A kept quantizer's Q and DQ nodes stay in the graph as they are,
            for a runtime that wants to see them, so that the layers at both ends are not merged over
            it.

    Raises:
        ValueError: an edge matches no quantizer, or is neither merged nor kept.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        >>> params = {name: p.detach() for name, p in model.named_parameters()}
        >>> x = torch.ones(3, 2)
        >>> plan = fquant.make_plan(model, fquant.w8a8(), (x,))
        >>> stats = fquant.calibrate_model(model, plan, params, [x], progress=False)
        >>> program = fquant.export_qdq(model, plan, params, fquant.finalize(plan, stats), (x,))
        >>> lowered, report = fquant.lower(program)
        >>> [(layer.site, layer.operation, layer.kernel) for layer in report.layers]
        [('0/linear#0', 'linear+relu', 'linear_int8'), ('2/linear#0', 'linear', 'linear_int8')]
        >>> report.kept
        ('0/linear#0.input',)
    """
    require_program("lower", program)
    editor = Editor(program)
    label_quantizers(editor.graph)
    _mark_edges(editor, edges or {})
    tidy(editor)
    layers: list[LayerReport] = []
    done: set[Node] = set()
    for node in list(editor.graph.nodes):
        if node.op == "call_function" and node not in done and not is_quantize(node):
            report = _lower_node(editor, node, table, done)
            if report is not None:
                layers.append(report)
    lowered = editor.finish()
    left = [
        quantization_of(node).name
        for node in lowered.graph.nodes
        if is_quantize(node) or qdq_ops.is_dequantize(node)
    ]
    return Lowered(lowered, LoweringReport(tuple(layers), tuple(dict.fromkeys(left))))


def _lower_node(
    editor: Editor, node: Node, table: Sequence[Lowering], done: set[Node]
) -> LayerReport | None:
    """Lowers one operation if a line of the table can; returns what became of it.

    Nodes that became part of it are added to `done`.
    """
    entries = [entry for entry in table if node.target in entry.match]
    inputs = quantized_inputs(node)
    if not inputs or editor.constant(node) or qdq_ops.is_dequantize(node):
        return None
    operands = operands_of(editor, node)
    site = quantization_of(inputs[0]).name.rpartition(".")[0]
    name = str(getattr(node.target, "_opname", node.target))
    if not entries:
        if node.target in SUNK:
            return None
        return LayerReport(site, name, "", operands, None, f"the table has no lowering for {name}")
    reasons = []
    for entry in entries:
        pattern = find_pattern(editor, node, entry.absorbs, entry.shifted)
        why_float = _why_float(editor, pattern, entry.shifted)
        result = None if pattern.quantize is None else describe(editor, pattern.quantize)
        try:
            new = entry.build(editor, pattern)
        except NotLowered as reason:
            reasons.append(str(reason))
            continue
        done.update(pattern.nodes)
        if pattern.quantize is None:
            editor.replace(pattern.last, new)
        else:
            new.meta["quantizer"] = pattern.quantize.meta["quantizer"]
            editor.replace(pattern.quantize, new)
        return LayerReport(site, "+".join(pattern.steps), entry.kernel, operands, result, why_float)
    return LayerReport(site, name, "", operands, None, "; ".join(dict.fromkeys(reasons)))


def _why_float(editor: Editor, pattern: Pattern, shifted: bool) -> str:
    """Why the result of a layer is not rounded to integers by it, if anything would round it."""
    if pattern.quantize is not None:
        return ""
    users = list(pattern.last.users)
    rounding = [user for user in users if is_quantize(user)]
    if not rounding:
        return ""
    if len(users) > 1:
        return "its result is float: " + (
            "it is also used unrounded"
            if len(rounding) < len(users)
            else "it is rounded by several scales"
        )
    return f"its result is float: {why_not_int8(editor, rounding[0], shifted)}"


def _mark_edges(editor: Editor, edges: Mapping[str, str]) -> None:
    nodes: list[Any] = editor.nodes(qdq_ops.quantize, qdq_ops.dequantize)
    used = set()
    for node in nodes:
        name = quantization_of(node).name
        for pattern, choice in edges.items():
            if choice not in (MERGE, KEEP):
                raise ValueError(f"lower: edges must be 'merge' or 'keep', got {choice!r}.")
            if re.fullmatch(pattern, name):
                used.add(pattern)
                if choice == KEEP:
                    node.meta["keep"] = True
                break
    for pattern in edges:
        if pattern not in used:
            names = sorted({quantization_of(node).name for node in nodes})
            raise ValueError(f"lower: edges must match quantizers of {names}, got {pattern!r}.")
