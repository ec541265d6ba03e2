"""`to_onnx`: a Q/DQ program as an ONNX file."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from fquant.affine import quantize
from fquant.calibration import at_site
from fquant.graph.editor import Editor, require_program
from fquant.graph.onnx.qdq import QUANTIZER, qdq_translations
from fquant.graph.onnx.sparse import define_sparse_operators, sparse_translations
from fquant.graph.onnx.types import onnx_type_of, opset_of
from fquant.graph.qdq_ops import Quantization, is_dequantize, is_quantize, quantization_of
from fquant.optional import require_package
from fquant.serialization.atomic import replacing
from fquant.spec import QuantSpec


def to_onnx(
    program: ExportedProgram,
    path: str | Path,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> None:
    """Writes a program of `export_qdq` as ONNX with QuantizeLinear and DequantizeLinear.

    ONNX Runtime gives the same integers from the same inputs: rounding, saturation and, where the
    ONNX type is wider than the format, clipping are those of `fquant.quantize`. What is between may
    differ in the last bits of floats. Formats are stored as

        2 to 4 bits     INT4, UINT4         E4M3, E5M2            FLOAT8E4M3FN, FLOAT8E5M2
        5 to 8 bits     INT8, UINT8         E4M3FNUZ, E5M2FNUZ    FLOAT8E4M3FNUZ, FLOAT8E5M2FNUZ
        9 to 16 bits    INT16, UINT16       E2M1                  FLOAT4E2M1

    in opset 21, with FLOAT4E2M1 in opset 23 (ONNX Runtime 1.32 has no CPU code for that type), and with
    a scale per tensor, per axis, or per block. Params and stored integers keep their names in the
    program's state, both operators carry the quantizer's name in their metadata, and dynamic sizes stay
    dynamic.
    Sparse layers are operators of the domain "fquant" (`fquant.graph.onnx.sparse`). The file is
    checked by onnx.checker, and written atomically.

    Args:
        program: of `export_qdq`, in float32 or a half type; `weights="integer"` makes weights
            integers in the file.
        path: of the file; by habit it ends in .onnx.
        input_names: of the graph's inputs, in order; None for the program's, `args_0` and so on.
        output_names: of its outputs; None for the operations they come from.

    Raises:
        ImportError: onnx or onnxscript is not installed (`pip install 'fquant[onnx]'`).
        ValueError: a quantizer's format or rounding is none that ONNX has, or it computes in float64
            (the message names it); names are not as many as inputs or outputs, or not different.

    Example:
        >>> import tempfile
        >>> model = torch.nn.Linear(2, 1)
        >>> params = {name: p.detach() for name, p in model.named_parameters()}
        >>> x = torch.ones(3, 2)
        >>> plan = fquant.make_plan(model, fquant.w8a8(), (x,))
        >>> stats = fquant.calibrate_model(model, plan, params, [x], progress=False)
        >>> qstate = fquant.finalize(plan, stats)
        >>> program = fquant.export_qdq(model, plan, params, qstate, (x,), weights="integer")
        >>> fquant.to_onnx(program, tempfile.mkdtemp() + "/model.onnx")

    References:
        ONNX operators QuantizeLinear and DequantizeLinear, versions 21 and 23.
    """
    require_program("to_onnx", program)
    onnx = require_package("onnx", "fquant.to_onnx", "onnx")
    require_package("onnxscript", "fquant.to_onnx", "onnx")
    inside = _require_expressible(program)
    quantizers = [n for n in program.graph.nodes if is_quantize(n) or is_dequantize(n)]
    opset = opset_of(quantization_of(n).format for n in quantizers)
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        optimize=False,
        verbose=False,
        custom_translation_table={**qdq_translations(inside), **sparse_translations()},
    )
    assert exported is not None
    _type_codes(exported.model)
    exported.optimize()
    _drop_traces(exported.model)
    _drop_what_follows(exported.model, opset)
    define_sparse_operators(exported.model)  # last: optimizing puts functions in place of calls
    _rename("input_names", exported.model.graph.inputs, input_names)
    _rename("output_names", exported.model.graph.outputs, output_names)
    exported.model.producer_name = "fquant"
    onnx.checker.check_model(exported.model_proto, full_check=True)
    with replacing(path) as temporary:
        exported.save(temporary)


def _rename(argument: str, values: Sequence[Any], names: Sequence[str] | None) -> None:
    if names is None:
        return
    if len(names) != len(values) or len(set(names)) != len(values):
        raise ValueError(
            f"to_onnx: {argument} must be {len(values)} different names, got {list(names)}."
        )
    for value, name in zip(values, names, strict=True):
        value.name = name


def _drop_traces(model: Any) -> None:
    """Takes out the exporter's notes, stack traces with this machine's paths among them."""
    for node in model.graph:
        kept = {k: v for k, v in node.metadata_props.items() if k == QUANTIZER}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


# The attributes of convolutions and pools that are lists, and what each of them is if it is absent.
_ABSENT = {"pads": 0, "strides": 1, "dilations": 1}


def _drop_what_follows(model: Any, opset: int) -> None:
    """Takes out what readers work out by themselves: inner shapes, and attributes at their default."""
    onnx = require_package("onnx", "fquant.to_onnx", "onnx")
    for value in model.graph.initializers.values():
        value.shape = value.type = None  # the tensor has its own
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
        if node.domain or not onnx.defs.has(node.op_type, opset):
            continue
        known = onnx.defs.get_schema(node.op_type, opset).attributes
        for name, attribute in list(node.attributes.items()):
            default = known[name].default_value if name in known else None
            static = default is not None and default.type and _value_of(default) == attribute.value
            if static or (name in _ABSENT and set(attribute.value) == {_ABSENT[name]}):
                del node.attributes[name]


def _value_of(attribute: Any) -> Any:
    value = require_package("onnx", "fquant.to_onnx", "onnx").helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def _require_expressible(program: ExportedProgram) -> set[str]:
    """Raises unless ONNX has every quantizer; returns those whose constant inputs need no clipping."""
    editor = Editor(program)
    clipped: set[str] = set()
    constant: set[str] = set()
    for node in editor.graph.nodes:
        if not is_quantize(node) and not is_dequantize(node):
            continue
        at = quantization_of(node)
        at_site(at.name, onnx_type_of, at.format)
        if is_dequantize(node):
            continue
        if at.format.rounding != "half_even":
            raise ValueError(
                f"site {at.name!r}: to_onnx: rounding must be half to even, as QuantizeLinear's is, got "
                f"{at.format.rounding!r}. Weights may round in any way with "
                "export_qdq(..., weights='integer')."
            )
        if at.input.meta["val"].dtype == torch.float64:
            raise ValueError(
                f"site {at.name!r}: to_onnx: x must be of float32 or a half type, as "
                "QuantizeLinear is, got float64."
            )
        fits = editor.constant(node) and _stays_inside(editor, at, editor.value(node))
        (constant if fits else clipped).add(at.name)
    return constant - clipped


def _stays_inside(editor: Editor, at: Quantization, q: torch.Tensor) -> bool:
    if not isinstance(at.format, QuantSpec):
        return False
    x, scale, zero_point = (editor.value(v) for v in (at.input, at.scale, at.zero_point))
    wide = replace(at.format, num_bits=16, narrow_range=False)
    return torch.equal(quantize(x, scale, zero_point, wide).q.int(), q.int())


def _type_codes(model: Any) -> None:
    """Gives codes their ONNX types: torch holds 4-bit integers in int8, and float codes in uint8."""
    ir = require_package("onnx_ir", "fquant.to_onnx", "onnx")
    graph, typed = model.graph, {}
    for node in list(graph):
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = ir.DataType(node.attributes["output_dtype"].as_int())
        if node.op_type != "Cast":
            continue
        stored, to = node.inputs[0], ir.DataType(node.attributes["to"].as_int())
        users = node.outputs[0].uses()
        if not users or any(u.op_type != "DequantizeLinear" or at != 0 for u, at in users):
            continue
        if stored.const_value is None:
            raise ValueError(f"to_onnx: codes must be of a Q node or stored, got {stored.name}.")
        if stored.name not in typed:
            codes, dtype = stored.const_value.numpy(), to.numpy()
            codes = codes.view(dtype) if to.name.startswith("FLOAT") else codes.astype(dtype)
            typed[stored.name] = ir.tensor(codes, name=stored.name)
        node.outputs[0].replace_all_uses_with(stored)
        graph.remove(node, safe=True)
    for name, tensor in typed.items():
        value = graph.initializers[name]
        value.const_value, value.dtype = tensor, tensor.dtype
