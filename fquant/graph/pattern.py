"""What a lowering is about: a float operation between DQ and Q, with what follows it taken in."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from fquant.graph import int8_ops, qdq_ops
from fquant.graph.editor import Editor
from fquant.graph.qdq_ops import Quantization, is_dequantize, quantization_of
from fquant.spec import QuantSpec

aten = torch.ops.aten
NORM = aten._native_batch_norm_legit_no_training.default
ACTIVATIONS = (
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.clamp_min.default,
)
NORM_STEP, ADD_STEP, ACTIVATION_STEP = "norm", "add", "activation"
ALL_STEPS = (NORM_STEP, ADD_STEP, ACTIVATION_STEP)


class NotLowered(Exception):  # noqa: N818  # a reason, not an error
    """Raised by a `Lowering.build`: the reason why an operation stays in floating point."""


@dataclass(frozen=True)
class Pattern:
    """A float operation, what follows it, and the Q node that takes the result.

    Attributes:
        anchor: the operation's node; its operands may be DQ nodes.
        norm: a batch norm of its result.
        residual: a DQ node that is added after that.
        activation: (low, high) of a clamp after that; -inf or inf for no bound.
        last: the last float node, which the integer op replaces.
        quantize: the Q node that is its only user; None if the result is used as floats.
        steps: the names of the operations, for the report.
        nodes: the float nodes that the integer op makes superfluous.
    """

    anchor: Node
    norm: Node | None = None
    residual: Node | None = None
    activation: tuple[float, float] | None = None
    last: Any = None
    quantize: Node | None = None
    steps: tuple[str, ...] = ()
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True, repr=False)
class Lowering:
    """One line of a lowering table.

    Attributes:
        kernel: what the report calls it.
        match: the float ops it is about, such as `torch.ops.aten.linear.default`.
        build: `build(editor, pattern)` adds integer nodes before `pattern.last` and returns the one
            whose value takes its place: integers on the grid of `pattern.quantize`, or floats where
            that is None. Raises NotLowered with the reason otherwise.
        absorbs: which of "norm", "add" and "activation" may be part of the pattern.
        shifted: whether the kernel knows unsigned grids and zero points; without, their Q and DQ nodes
            stay.

    Example:
        >>> def build(editor, pattern):
        ...     x = integer_input(editor, pattern.anchor.args[0])
        ...     return editor.call(torch.ops.aten.abs.default, x.input, before=pattern.last)
        >>> table = (Lowering("abs_int8", (torch.ops.aten.abs.default,), build, absorbs=()),)
    """

    kernel: str
    match: tuple[Any, ...]
    build: Callable[[Editor, Pattern], Node]
    absorbs: tuple[str, ...] = field(default=ALL_STEPS)
    shifted: bool = False

    def __repr__(self) -> str:  # short, for the signatures that `help` shows
        return f"<lowering to {self.kernel}>"


class Integers(NamedTuple):
    """A constant weight: its integers, and a step per output channel or one for all (float32)."""

    q: torch.Tensor
    scale: torch.Tensor


def find_pattern(
    editor: Editor, anchor: Node, absorbs: tuple[str, ...], shifted: bool = False
) -> Pattern:
    """Returns the longest pattern from an operation on, through nodes with a single user."""
    norm = residual = activation = None
    last, steps, nodes = anchor, [_name(anchor)], [anchor]
    other: Any
    while True:
        user = next(iter(last.users)) if len(last.users) == 1 else None
        if user is None:
            break
        if user.target is NORM and NORM_STEP in absorbs and len(steps) == 1:
            norm = batch_norm_after(editor, anchor)
            if norm is None:
                break
            last = next(iter(norm.users))
            steps.append("batch_norm")
        elif user.target is aten.add.Tensor and ADD_STEP in absorbs and residual is None:
            other = next((a for a in user.args if a is not last), None)
            if user.kwargs or not is_dequantize(other) or why_not_int8(editor, other, shifted):
                break
            if other.meta["val"].shape != last.meta["val"].shape:
                break
            residual, last = other, user
            steps.append("add")
        elif user.target in ACTIVATIONS and ACTIVATION_STEP in absorbs and user.args[0] is last:
            activation, last = _bounds(user), user
            steps.append(_name(user))
            nodes.append(last)
            break
        else:
            break
        nodes.append(last)
    users = list(last.users)
    quantize = users[0] if len(users) == 1 and qdq_ops.is_quantize(users[0]) else None
    if quantize is not None and why_not_int8(editor, quantize, shifted):
        quantize = None
    return Pattern(anchor, norm, residual, activation, last, quantize, tuple(steps), tuple(nodes))


def batch_norm_after(editor: Editor, node: Node) -> Node | None:
    """Returns the batch norm that alone reads a layer's result, with constants that are known now."""
    norm = next(iter(node.users)) if len(node.users) == 1 else None
    if norm is None or norm.target is not NORM or norm.args[0] is not node:
        return None
    results = list(norm.users)
    if (
        len(results) != 1
        or results[0].args[1] != 0
        or not all(map(editor.constant, norm.args[1:5]))
    ):
        return None
    return norm


def is_quantized_constant(editor: Editor, node: Any) -> bool:
    """Whether a node is a DQ node of constant integers on a symmetric grid."""
    if not is_dequantize(node) or not editor.constant(node) or node.meta.get("keep"):
        return False
    x = quantization_of(node)
    return isinstance(x.format, QuantSpec) and x.zero_point is None


def why_not_int8(editor: Editor, node: Node, shifted: bool = False) -> str:
    """Returns why a Q or DQ node is none that the kernels take: at most 8 bits, one static step.

    Args:
        editor: the program.
        node: the node.
        shifted: whether an unsigned grid or a zero point is taken.
    """
    x = quantization_of(node)
    if not isinstance(x.format, QuantSpec) or x.format.num_bits > 8:
        return f"{x.name}: {x.format} is no integer grid of at most 8 bits"
    if not shifted and x.format.dtype != torch.int8:
        return f"{x.name} is of {x.format.dtype}"
    if not shifted and x.zero_point is not None:
        return f"{x.name} has a zero point"
    if not editor.constant(x.zero_point):
        return f"{x.name} has a zero point computed at run time"
    if x.format.rounding != "half_even":
        return f"{x.name} rounds by {x.format.rounding}"
    if node.meta.get("keep"):
        return f"edge {x.name} is kept"
    if not editor.constant(x.scale):
        return f"{x.name} has a scale computed at run time"
    if any(v is not None and v.meta["val"].numel() != 1 for v in (x.scale, x.zero_point)):
        return f"{x.name} has a scale per {qdq_ops.granularity_of(*_shapes(x))}, not per tensor"
    floats: Any = node if is_dequantize(node) else node.args[0]
    if floats.meta["val"].dtype != torch.float32:
        return f"{x.name} is of {floats.meta['val'].dtype}"
    return ""


def integer_input(editor: Editor, node: Any, shifted: bool = False) -> Quantization:
    """Returns what a DQ node says of an activation in int8.

    Args:
        editor: the program.
        node: the layer's input.
        shifted: whether an unsigned grid or a zero point will do.

    Raises:
        NotLowered: it is no DQ node, or none that the kernels take.
    """
    if not is_dequantize(node):
        raise NotLowered(f"its input {getattr(node, 'name', node)} is not quantized")
    reason = why_not_int8(editor, node, shifted)
    if reason:
        raise NotLowered(reason)
    return quantization_of(node)


def shifted_zero(editor: Editor, x: Quantization) -> int:
    """Returns the integer that means 0.0, less 128 for uint8: as the kernels count.

    Example: for a grid of uint8 with zero point 3 it is -125, for one of int8 without any it is 0.
    """
    zero = 0 if x.zero_point is None else int(editor.value(x.zero_point))
    return zero - shift_of(x.format)


def shift_of(spec: Any) -> int:
    """Returns what the kernels take off the integers of a grid: 128 where they are stored as uint8."""
    return int8_ops.SHIFT if spec.dtype == torch.uint8 else 0


def integer_weight(editor: Editor, node: Any, axis: int = 0, groups: int = 1) -> Integers:
    """Returns a constant weight in int8 with a step per output channel, which `axis` counts.

    In several groups `axis` counts the channels of one, and the DQ node has an axis of groups before.

    Raises:
        NotLowered: it is not quantized so.
    """
    shape = node.meta["val"].shape if isinstance(node, Node) else ()
    while isinstance(node, Node) and node.target is aten.reshape.default:
        node = node.args[0]
    if not is_dequantize(node) or not editor.constant(node):
        raise NotLowered("its weight is not a quantized constant")
    w = quantization_of(node)
    if not isinstance(w.format, QuantSpec) or w.format.dtype != torch.int8:
        raise NotLowered(f"{w.name}: {w.format} is no signed integer grid of at most 8 bits")
    if w.zero_point is not None or node.meta.get("keep"):
        raise NotLowered(f"{w.name} has a zero point, or is an edge that is kept")
    scale = editor.value(w.scale).float()
    if groups == 1:
        per_channel = scale.numel() != 1 and scale.numel() == scale.shape[axis] == shape[axis]
    else:
        each = [shape[axis] if a == axis else 1 for a in range(len(shape))]
        per_channel = list(scale.shape) == [groups, *each]
    if scale.numel() != 1 and not per_channel:
        raise NotLowered(
            f"{w.name} has a scale per {qdq_ops.granularity_of(*_shapes(w))}, not per output channel"
        )
    return Integers(editor.value(w.input).reshape(shape), scale.reshape(-1))


def _shapes(x: Quantization) -> tuple[Any, Any]:
    return x.scale.meta["val"].shape, x.input.meta["val"].shape


def _name(node: Node) -> str:
    target: Any = node.target
    return str(getattr(target, "_opname", getattr(target, "__name__", target)))


def _bounds(node: Node) -> tuple[float, float]:
    inf = float("inf")
    if node.target is aten.relu.default:
        return 0.0, inf
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    low, high = (*node.args[1:], *node.kwargs.values(), None, None)[:2]
    if node.target is aten.hardtanh.default:
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    return (-inf if low is None else float(low)), (inf if high is None else float(high))  # type: ignore[arg-type]
