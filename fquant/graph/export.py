"""`export_qdq`: a model under a plan as one graph with Q/DQ nodes in it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from fquant.calibration import require_sites
from fquant.graph import qdq_ops
from fquant.graph.editor import Editor
from fquant.interception.ops import DEFAULT_OPS, Ops
from fquant.op_rules import Quantizer
from fquant.plan import Plan
from fquant.planned_model import FakeQuantizing, Params, PlannedModel
from fquant.qstate import State, qstate_names
from fquant.records import QTensor
from fquant.sparse import KernelMap, SparseTensor

aten = torch.ops.aten


def export_qdq(
    model: nn.Module,
    plan: Plan,
    params: Params,
    qstate: State,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    weights: str = "float",
    ops: Ops = DEFAULT_OPS,
) -> ExportedProgram:
    """Returns `fake_quant(model, plan)` in eval mode as a program, each quantizer as two nodes.

    The nodes are described in `fquant.graph.qdq_ops`. Values equal those of `fake_quant` bit for bit,
    but for NaN, for which integers have no code. The graph is functional, its operations are torch's
    layers (`aten.linear`, `aten.conv2d`, `aten.batch_norm`, ...), and a sparse convolution is one
    node. Params, scales and buffers are state of the program, under `params.<name>`,
    `scales.<quantizer>`, `zero_points.<quantizer>` and `integers.<quantizer>`: the tensors given, or
    integers made of them.

    Args:
        model: what the plan was made for; not written, and no part of the program.
        plan: what to quantize.
        params: parameters, and buffers, by name.
        qstate: the scales, from `finalize` or training.
        args: example arguments; records may be among them.
        kwargs: example keyword arguments.
        dynamic_shapes: which sizes may vary, as for `torch.export.export`; for the rows of a sparse
            tensor see `fquant.graph.dynamic_rows`.
        weights: "float" for float weights, a Q and a DQ node; "integer" for what the Q node gives
            stored in its place, a quarter of the size.
        ops: the table that the plan was made with.

    Raises:
        ValueError: as `fake_quant`; weights is neither of the two.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> params = {name: p.detach() for name, p in model.named_parameters()}
        >>> x = torch.ones(3, 2)
        >>> plan = fquant.make_plan(model, fquant.w8a8(), (x,))
        >>> stats = fquant.calibrate_model(model, plan, params, [x], progress=False)
        >>> qstate = fquant.finalize(plan, stats)
        >>> program = fquant.export_qdq(model, plan, params, qstate, (x,), weights="integer")
        >>> [n.name for n in program.graph.nodes if n.op == "call_function"]
        ['quantize', 'dequantize', 'dequantize_1', 'linear']
        >>> torch.equal(program.module()(x), fquant.fake_quant(model, plan)(params, qstate, x))
        True
    """
    if weights not in ("float", "integer"):
        raise ValueError(f"export_qdq: weights must be 'float' or 'integer', got {weights!r}.")
    require_sites("export_qdq", "qstate", qstate, qstate_names(plan))
    captured = _Captured(PlannedModel(model, plan, False, ops), params, qstate)
    program = torch.export.export(
        captured, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
    )
    program = _without_copies(program.run_decompositions({}))  # functional, layers kept
    return program if weights == "float" else store_integers(program)


def dynamic_rows(tree: Any) -> torch.export.ShapesCollection:
    """Returns `dynamic_shapes` that let the number of cells of every sparse record vary.

    Args:
        tree: example arguments; SparseTensors, their maps and other KernelMaps are found in it.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.eye(3)[None, None])
        >>> shapes = dynamic_rows((x, fquant.sparse.subm_map(x, 3)))
    """
    shapes = torch.export.ShapesCollection()

    def add(record: Any) -> bool:
        rows: dict[str, int] = {}
        if isinstance(record, SparseTensor):
            rows = {"features": 0, "coords": 0}
            pytree.tree_map(lambda leaf: leaf, record.maps or {}, is_leaf=add)
        elif isinstance(record, KernelMap):
            rows = {"neighbors": 1, "in_coords": 0, "out_coords": 0}
        for field, axis in rows.items():
            value = getattr(record, field)
            shapes[value.q if isinstance(value, QTensor) else value] = {axis: Dim.AUTO}
        return bool(rows)

    pytree.tree_map(lambda leaf: leaf, tree, is_leaf=add)
    return shapes


def store_integers(program: ExportedProgram) -> ExportedProgram:
    """Returns a Q/DQ program in which every Q node of a constant is the integers that it gives."""
    editor = Editor(program)
    for node in editor.nodes(qdq_ops.quantize):
        if editor.constant(node):
            name = "integers." + qdq_ops.state_name(qdq_ops.quantization_of(node).name)
            editor.replace(node, editor.add_state(name, editor.value(node)))
    return editor.finish()


class _Captured(nn.Module):
    """The program's owner: a module with the params and scales as state, and nothing of the model's."""

    def __init__(self, program: PlannedModel, params: Params, qstate: State) -> None:
        super().__init__()
        self.program = [program]  # in a list, so that its modules are none of this one's
        self.names: dict[str, tuple[nn.Module, str]] = {}
        self.scale_names: dict[str, str] = {}
        self.params = nn.Module()
        self.scales = nn.Module()
        given = program.named_once("export_qdq", params)
        for name, tensor in {**program.buffers, **given}.items():
            self._own(self.params, name, tensor)
        for name, scale in qstate.items():
            attribute = qdq_ops.state_name(name)
            while attribute in self.scales._buffers:
                attribute += "_"
            self.scale_names[name] = attribute
            self.scales.register_buffer(attribute, torch.as_tensor(scale).detach())

    def _own(self, home: nn.Module, name: str, tensor: Tensor) -> None:
        *path, last = name.split(".")
        for part in path:
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = home.get_submodule(part)
        home.register_buffer(last, tensor.detach())
        self.names[name] = (home, last)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        params = {name: getattr(home, last) for name, (home, last) in self.names.items()}
        scales = {name: getattr(self.scales, a) for name, a in self.scale_names.items()}
        interpreter = _Capture(self.program[0], scales)
        return self.program[0].run("export_qdq", interpreter, params, args, kwargs)[0]


class _Capture(FakeQuantizing):
    """Rounds by a Q and a DQ node where fake quantization has arithmetic."""

    captures = True

    def rounded(
        self, name: str, x: Tensor, quantizer: Quantizer, scale: Tensor, zero_point: Tensor | None
    ) -> Tensor:
        text = qdq_ops.format_to_text(quantizer.spec)
        integer = None if zero_point is None else zero_point.to(torch.int32)
        q = qdq_ops.quantize(x, scale, integer, text, name)
        return qdq_ops.dequantize(q, scale, integer, text, x.dtype, name)


def _without_copies(program: ExportedProgram) -> ExportedProgram:
    """Takes out copies, which nothing writes in a functional graph, and checks of dtypes.

    Zero points that are known become state as the integers that they are.
    """
    editor = Editor(program)
    zero_points: dict[Any, Any] = {}
    for node in editor.nodes(qdq_ops.quantize, qdq_ops.dequantize):
        x = qdq_ops.quantization_of(node)
        if x.zero_point is not None and editor.constant(x.zero_point):
            if x.zero_point not in zero_points:
                name = f"zero_points.{qdq_ops.state_name(x.name)}"
                zero_points[x.zero_point] = editor.add_state(name, editor.value(x.zero_point))
            node.update_arg(2, zero_points[x.zero_point])
    for node in editor.nodes(aten._assert_tensor_metadata.default):
        editor.graph.erase_node(node)
    for node in editor.nodes(aten.clone.default, aten.copy.default):
        source: Any = node.args[-1]
        same = all(
            getattr(node.meta["val"], what) == getattr(source.meta["val"], what)
            for what in ("shape", "dtype", "device")
        )
        returned = any(user.op == "output" for user in node.users)
        if same and not returned and not node.kwargs and len(node.args) <= 2:
            editor.replace(node, source)
    return editor.finish()
