"""Exact rewrites of Q/DQ nodes that bring them next to the operations they belong to.

None changes a value: rounding is monotonic and acts on each element alone, so it commutes with moving
elements and with taking the largest.

    merge    equal Q nodes of one tensor                          -> one
    lift     relu(move(x))                                        -> move(relu(x))
    hoist    Q(move(x)), Q(cat(a, b)), Q(max_pool(x))             -> move(Q(x)), ...
    sink     move(DQ(q)), cat of DQ nodes with one scale          -> DQ(move(q))
    cancel   Q(DQ(q)) on one grid                                 -> q

Nodes with `meta["keep"]` stay as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from fquant.graph import int8_ops, qdq_ops
from fquant.graph.editor import Editor
from fquant.graph.qdq_ops import is_dequantize, quantization_of

aten = torch.ops.aten
CAT = aten.cat.default
# Each element of the result is an element of the first argument, or the largest of several.
RESHAPES = (
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.clone.default,
)
DENSE_POOLS = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
POOLS = (*DENSE_POOLS, torch.ops.fquant.sparse_max_pool.default)
PARTS = (aten.slice.Tensor, aten.select.int, aten.expand.default, aten.index_select.default)
HOISTED = (*RESHAPES, *POOLS, CAT)
SUNK = (*RESHAPES, *POOLS, *PARTS, CAT)


def tidy(editor: Editor) -> None:
    """Applies all of them, until nothing moves any more."""
    for view in editor.nodes(aten.view.default, aten._unsafe_view.default):
        view.target = aten.reshape.default  # integer layers give channels-last strides
    lift_relu(editor)
    changed = True
    while changed:
        merge_quantize(editor)
        changed = hoist_quantize(editor)
    sink_dequantize(editor)
    cancel(editor)
    merge_quantize(editor)


def same_grid(editor: Editor, a: Node, b: Node) -> bool:
    """Whether two Q or DQ nodes have one format and equal steps, known now."""
    x, y = quantization_of(a), quantization_of(b)
    if x.format != y.format or (x.zero_point is None) != (y.zero_point is None):
        return False
    return all(
        editor.constant(first)
        and editor.constant(second)
        and _equal(editor.value(first), editor.value(second))
        for first, second in ((x.scale, y.scale), (x.zero_point, y.zero_point))
    )


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and torch.equal(first, second)


def merge_quantize(editor: Editor) -> None:
    """Lets Q nodes of one tensor and grid be one node."""
    seen: dict[Node, list[Node]] = {}
    for node in editor.nodes(qdq_ops.quantize):
        if node.meta.get("keep"):
            continue
        others = seen.setdefault(node.args[0], [])  # type: ignore[arg-type]
        twin = next((o for o in others if same_grid(editor, o, node)), None)
        if twin is None:
            others.append(node)
        else:
            editor.replace(node, twin)
            editor.graph.erase_node(node)


def lift_relu(editor: Editor) -> None:
    """Puts ReLU before what moves elements, where it can be part of the layer above."""
    for node in reversed(editor.nodes(aten.relu.default)):
        moved: Any = node.args[0]
        while moved.target in (*RESHAPES, *POOLS) and len(moved.users) == 1:
            source = moved.args[0]
            inner = editor.call(aten.relu.default, source, before=moved)
            moved.replace_input_with(source, inner)
            inner.replace_input_with(inner, source)
            editor.replace(node, moved)
            editor.graph.erase_node(node)
            node, moved = inner, source


def hoist_quantize(editor: Editor) -> bool:
    """Puts Q before what moves elements; returns whether any was moved."""
    changed = False
    for node in reversed(editor.nodes(qdq_ops.quantize)):
        source: Any = node.args[0]
        if not _movable(editor, node) or source.target not in HOISTED or len(source.users) != 1:
            continue
        if _rounds_up(source):
            continue
        rest = node.args[1:]

        def quantized(x: Node, source: Node = source, rest: Any = rest) -> Node:
            q = editor.call(qdq_ops.quantize, x, *rest, before=source)
            q.meta["quantizer"] = ""  # the site's integers are those after the move
            return q

        moved = _moved(editor, source, quantized, before=source)
        moved.meta["quantizer"] = node.meta["quantizer"]
        editor.replace(node, moved)
        editor.graph.erase_node(node)
        editor.graph.erase_node(source)
        changed = True
    return changed


def sink_dequantize(editor: Editor) -> None:
    """Puts DQ after what moves elements."""
    for move in editor.nodes(*SUNK):
        inputs = _tensors(move)
        if _rounds_up(move) or not all(is_dequantize(x) and _movable(editor, x) for x in inputs):
            continue
        first = inputs[0]
        if editor.constant(first) or not all(same_grid(editor, first, x) for x in inputs[1:]):
            continue
        integers = _moved(editor, move, lambda x: x.args[0], before=move)  # type: ignore[arg-type,return-value]
        floats = editor.call(qdq_ops.dequantize, integers, *first.args[1:], before=move)
        editor.replace(move, floats)
        editor.graph.erase_node(move)


def cancel(editor: Editor) -> None:
    """Takes out Q of DQ on the same grid."""
    for node in editor.nodes(qdq_ops.quantize):
        source: Any = node.args[0]
        if not is_dequantize(source) or node.meta.get("keep") or source.meta.get("keep"):
            continue
        if same_grid(editor, source, node):
            editor.replace(node, source.args[0])


def _movable(editor: Editor, node: Node) -> bool:
    """Whether a Q or DQ node has one static step, so that it does not matter where elements are."""
    x = quantization_of(node)
    static = all(
        v is None or (editor.constant(v) and v.meta["val"].numel() == 1)
        for v in (x.scale, x.zero_point)
    )
    return static and not node.meta.get("keep")


def per_axis(value: Any, axes: int) -> list[int]:
    """Returns one int per axis of what torch takes: an int, or a list of one or of all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _rounds_up(move: Node) -> bool:
    """Whether it is a pool in ceil mode, which has no form for integers here."""
    return move.target in DENSE_POOLS and len(move.args) > 5 and bool(move.args[5])


def _tensors(move: Node) -> Sequence[Node]:
    """What a moving node moves: the first argument, or the list of a concatenation."""
    return list(move.args[0]) if move.target is CAT else [move.args[0]]  # type: ignore[arg-type,list-item]


def _moved(editor: Editor, move: Node, change: Callable[[Node], Node], before: Node) -> Node:
    """Returns the same move of changed tensors; integers are pooled by an op of their own."""
    first: Any = move.args[0]
    if move.target in DENSE_POOLS:
        axes = int(move.target._opname[-2])
        x = change(first)
        if x.meta["val"].is_floating_point():
            return editor.call(move.target, x, *move.args[1:], before=before)
        kernel = per_axis(move.args[1], axes)
        defaults = (kernel, [0] * axes, [1] * axes)
        given = [per_axis(value, axes) for value in move.args[2:5]]
        geometry = [value or default for value, default in zip(given, defaults, strict=False)]
        return editor.call(
            int8_ops.max_pool_int8, x, kernel, *geometry, *defaults[len(geometry) :], before=before
        )
    new = map_arg(first, change) if move.target is CAT else change(first)
    return editor.call(move.target, new, *move.args[1:], before=before)
