"""`prepack`: a lowered program for the CPU it runs on, weights in the order its kernels read them."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

import fquant_kernels
from fquant.graph import int8_ops
from fquant.graph.editor import Editor, require_program

_DENSE = (int8_ops.linear_int8, int8_ops.conv_int8, int8_ops.conv_transpose_int8)
_IN_GROUPS = (int8_ops.conv_int8, int8_ops.conv_transpose_int8)
_SPARSE = torch.ops.fquant.sparse_conv_int8.default


def prepack(program: ExportedProgram, isa: str | None = None) -> ExportedProgram:
    """Returns a lowered program with weights arranged ahead of time for one CPU instruction set.

    Same values, bit for bit. Otherwise weights are arranged at every call, which takes longer than the
    products where a layer has few rows. The result runs on CPUs with that instruction set only, and
    says so elsewhere: save the program from `lower`, and pack it where it is loaded.

    Args:
        program: from `lower`; not written.
        isa: one of `fquant_kernels.native.ISAS`; None for the best one here.

    Raises:
        RuntimeError: this processor lacks it, or the compiled kernels are missing.
    """
    require_program("prepack", program)
    editor = Editor(program)
    for node in editor.nodes(*_DENSE, _SPARSE):
        _pack(editor, node, isa)
    return editor.finish()


def _pack(editor: Editor, node: Node, isa: str | None) -> None:
    dense = node.target is not _SPARSE
    x, *rest = node.args
    zero = [rest.pop(0)] if dense else []
    weight = rest.pop(0)
    grouped = node.target in _IN_GROUPS and rest[-1] != 1
    if grouped or not editor.constant(weight):
        return
    value: Tensor = editor.value(weight)
    if value.dtype != torch.int8:
        return
    shape = [value.shape[0], math.prod(value.shape[1:-1]), value.shape[-1]]
    packed, name = fquant_kernels.pack_weight_for(value.reshape(shape), isa)
    stored = editor.add_state(f"packed.{weight.name}", packed)  # type: ignore[union-attr]
    arguments: tuple[Any, ...] = (x, stored, shape, name, *rest)
    target: Any = torch.ops.fquant.sparse_conv_int8_packed.default
    if dense:
        target, arguments = node.target, (x, *zero, stored, rest[0], name, *rest[2:])
    editor.replace(node, editor.call(target, *arguments, before=node))
