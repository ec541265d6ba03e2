"""`fold_norms`: batch norms of a Q/DQ program as part of the scales and biases of the layers before."""

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from fquant.graph.editor import Editor, require_program
from fquant.graph.pattern import aten, batch_norm_after, is_quantized_constant
from fquant.graph.qdq_ops import dequantize, quantization_of, state_name

# Layers that count output channels along the weight's first axis, with the place of their bias.
LAYERS: dict[Any, int] = {
    aten.linear.default: 2,
    aten.conv1d.default: 2,
    aten.conv2d.default: 2,
    aten.conv3d.default: 2,
    torch.ops.fquant.sparse_conv.default: 3,
}
_RESHAPES = (aten.reshape.default, aten.view.default, aten.flatten.using_ints)


def fold_norms(program: ExportedProgram) -> ExportedProgram:
    """Returns a Q/DQ program whose batch norms are in the scales and biases of the layers before them.

        scale[c] * f[c],    (bias[c] - mean[c]) * f[c] + beta[c],    f = gamma / sqrt(var + eps)

    in float64, rounded once. Integers stay as they are; where gamma is negative those of the channel
    change sign, so that scales are positive. Values change in their last bits. `lower` folds batch
    norms by itself; this is for ONNX files, which are smaller and have fewer nodes for it.

    Folded are those behind a linear layer or (sparse) convolution whose weight is on a symmetric integer
    grid with a scale per tensor or output channel; others stay. With float weights in the program
    (`export_qdq(..., weights="float")`) their Q node keeps its scale and the DQ node has another.

    Args:
        program: from `export_qdq`; not written.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)).eval()
        >>> params = {n: p.detach() for n, p in [*model.named_parameters(), *model.named_buffers()]}
        >>> x = torch.ones(1, 1, 4, 4)
        >>> plan = fquant.make_plan(model, fquant.w8a8(), (x,))
        >>> stats = fquant.calibrate_model(model, plan, params, [x], progress=False)
        >>> qstate = fquant.finalize(plan, stats)
        >>> program = fquant.export_qdq(model, plan, params, qstate, (x,), weights="integer")
        >>> [n.name for n in fold_norms(program).graph.nodes if n.op == "call_function"]
        ['quantize', 'dequantize', 'dequantize_default', 'conv2d_default']
    """
    require_program("fold_norms", program)
    editor = Editor(program)
    for node in editor.nodes(*LAYERS):
        norm = batch_norm_after(editor, node)
        if norm is not None:
            _fold(editor, node, norm)
    return editor.finish()


def norm_as_affine(editor: Editor, norm: Node, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (factor, shift) in float64: `norm(y + offset) = y * factor + shift` by channel."""
    gamma, beta, mean, variance = (
        None if a is None else editor.value(a).double() for a in norm.args[1:5]
    )
    eps: Any = norm.args[6]
    assert mean is not None
    assert variance is not None
    factor = torch.rsqrt(variance + eps)
    factor = factor if gamma is None else factor * gamma
    shift = -mean if offset is None else offset.double() - mean
    shift = shift * factor if beta is None else shift * factor + beta
    return factor, shift


def _fold(editor: Editor, node: Node, norm: Node) -> None:
    at = LAYERS[node.target]
    arguments: list[Any] = [*node.args, *[None] * (at + 1 - len(node.args))]
    shape = arguments[1].meta["val"].shape
    weight, bias = arguments[1], arguments[at]
    reshapes: list[Any] = []
    while weight.target in _RESHAPES:
        reshapes.insert(0, weight)
        weight = weight.args[0]
    if not is_quantized_constant(editor, weight) or not editor.constant(bias):
        return
    w = quantization_of(weight)
    scale: Tensor = editor.value(w.scale)
    per_channel = [shape[0], *[1] * (len(weight.meta["val"].shape) - 1)]
    if scale.numel() != 1 and list(scale.shape) != per_channel:
        return
    factor, shift = norm_as_affine(editor, norm, editor.value(bias))
    factor = factor.reshape(per_channel)
    q: Tensor = editor.value(w.input)
    stored, name = w.input, f"folded.{state_name(w.name)}"
    if bool((factor < 0).any()):
        if bool((q.to(torch.int64) * factor.sign() > w.format.q_max).any()):
            return  # -128 has no opposite
        stored = editor.add_state(f"{name}.q", torch.where(factor < 0, -q, q))
    step = editor.add_state(f"{name}.scale", (scale * factor.abs()).to(scale.dtype))
    folded = editor.call(dequantize, stored, step, None, *weight.args[3:], before=node)
    for reshape in reshapes:
        folded = editor.call(reshape.target, folded, *reshape.args[1:], before=node)
    arguments[1] = folded
    arguments[at] = editor.add_state(f"{name}.bias", shift.to(node.meta["val"].dtype))
    new = editor.call(node.target, *arguments, before=norm)
    editor.replace(next(iter(norm.users)), new)
