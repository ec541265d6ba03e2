"""`to_quantized_decomposed`: Q/DQ nodes as torch's own `quantized_decomposed` ops."""

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from fquant.graph import qdq_ops
from fquant.graph.editor import Editor, require_program
from fquant.graph.qdq_ops import is_quantize, quantization_of
from fquant.spec import QuantSpec


def to_quantized_decomposed(program: ExportedProgram) -> ExportedProgram:
    """Returns a Q/DQ program with the nodes that torch's PT2E tools and Inductor's patterns know.

    Nodes with a step per tensor or per channel on an integer grid of at most 8 bits become
    `quantized_decomposed.quantize_per_tensor`, `quantize_per_channel` and their inverses; others
    stay. torch's ops round `x * (1 / scale)` where fquant, ONNX and TensorRT round `x / scale`: values
    next to a tie come out one step apart, 2 of 1,000,000 normal values at scale 0.03, none at 0.1, and
    31 % of values made to be ties at 0.03. So this is for tools that ask for these nodes.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> params = {name: p.detach() for name, p in model.named_parameters()}
        >>> x = torch.ones(3, 2)
        >>> plan = fquant.make_plan(model, fquant.w8a8(), (x,))
        >>> stats = fquant.calibrate_model(model, plan, params, [x], progress=False)
        >>> program = fquant.export_qdq(model, plan, params, fquant.finalize(plan, stats), (x,))
        >>> swapped = fquant.graph.to_quantized_decomposed(program)
        >>> [n.target for n in swapped.graph.nodes if n.op == "call_function"][0]
        <OpOverload(op='quantized_decomposed.quantize_per_tensor', overload='default')>
    """
    import torch.ao.quantization.fx._decomposed  # registers the ops  # noqa: F401

    require_program("to_quantized_decomposed", program)
    editor = Editor(program)
    for node in editor.nodes(qdq_ops.quantize, qdq_ops.dequantize):
        _swap(editor, node)
    return editor.finish()


def _swap(editor: Editor, node: Node) -> None:
    x = quantization_of(node)
    floats: Any = node.args[0] if is_quantize(node) else node
    spec = x.format
    if not isinstance(spec, QuantSpec) or spec.num_bits > 8 or spec.rounding != "half_even":
        return
    if x.zero_point is not None or not editor.constant(x.scale):
        return
    if floats.meta["val"].dtype != torch.float32:
        return
    scale = editor.value(x.scale).float()
    limits = (spec.q_min, spec.q_max, spec.dtype)
    ops = torch.ops.quantized_decomposed
    kind = "quantize" if is_quantize(node) else "dequantize"
    arguments: tuple[Any, ...]
    if scale.numel() == 1:
        target = getattr(ops, f"{kind}_per_tensor").default
        arguments = (x.input, scale.item(), 0, *limits)
    else:
        axes = [a for a, size in enumerate(scale.shape) if size > 1]
        shape = x.input.meta["val"].shape
        if len(axes) != 1 or scale.ndim != len(shape) or scale.shape[axes[0]] != shape[axes[0]]:
            return
        target = getattr(ops, f"{kind}_per_channel").default
        steps = editor.add_state(f"steps.{node.name}", scale.reshape(-1))
        zeros = editor.add_state(
            f"zeros.{node.name}", torch.zeros(scale.numel(), dtype=torch.int64)
        )
        arguments = (x.input, steps, zeros, axes[0], *limits)
    editor.replace(node, editor.call(target, *arguments, before=node))
