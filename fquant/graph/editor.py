"""`Editor`: rewrites a copy of an exported program; what goes in is never written.

A program's graph is functional, and its parameters, buffers and constants ("state") are placeholders
before those of its inputs. The editor adds nodes and state, reads values that depend on state alone,
and puts together a valid program: dead nodes and unused state are gone, new nodes have metadata.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def require_program(function: str, program: object) -> None:
    """Raises TypeError unless program is an exported one."""
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"{function}: program must be an ExportedProgram, from export_qdq(model, plan, params, "
            f"qstate, args), got {type(program).__name__}."
        )


class Editor:
    """A program taken apart to be rewritten.

    Attributes:
        graph: the copy of its graph; FX's own methods apply.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self._module = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
        self.graph = self._module.graph
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        specs = program.graph_signature.input_specs
        self._specs = dict(zip(placeholders, specs, strict=True))
        held = {**program.constants, **program.state_dict}
        self._state: dict[Node, Tensor] = {
            node: held[spec.target].detach()
            for node, spec in self._specs.items()
            if spec.kind in STATE and spec.target is not None
        }
        self._names = {spec.target for spec in specs if spec.target is not None}
        self._values: dict[Node, Any] = dict(self._state)
        self._fake_mode = _fake_mode_of(placeholders)
        self._first_input = next((n for n in placeholders if n not in self._state), None)

    def nodes(self, *targets: Any) -> list[Node]:
        """Returns the calls of any of these ops, in order."""
        return [n for n in self.graph.nodes if n.op == "call_function" and n.target in targets]

    def constant(self, node: Any) -> bool:
        """Whether a node's value depends on state alone; anything that is no node does not vary."""
        if not isinstance(node, Node) or node in self._values:
            return True
        if node.op != "call_function":
            return False
        return not node.is_impure() and all(map(self.constant, node.all_input_nodes))

    def value(self, node: Any) -> Any:
        """Returns what a constant node holds; anything that is no node as it is."""
        if not isinstance(node, Node):
            return node
        if node not in self._values:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
            with torch.no_grad():
                self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._values[node]

    def add_state(self, name: str, value: Tensor) -> Node:
        """Returns a new placeholder that holds a tensor, under a name like `name`."""
        target, count = name, 0
        while target in self._names:
            count += 1
            target = f"{name}_{count}"
        self._names.add(target)
        value = value.detach().contiguous()
        before = self._first_input or next(n for n in self.graph.nodes if n.op == "output")
        with self.graph.inserting_before(before):
            node = self.graph.placeholder(f"b_{target.replace('.', '_')}")
        node.meta["val"] = self._fake_mode.from_tensor(value, static_shapes=True)
        self._state[node] = self._values[node] = value
        argument = TensorArgument(name=node.name)
        self._specs[node] = InputSpec(InputKind.BUFFER, argument, target, persistent=True)
        return node

    def call(self, target: Any, *args: Any, before: Node) -> Node:
        """Returns a new call of an op, with metadata, placed before a node."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args)
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        sizes = self._fake_mode.shape_env
        # Torch's convolution notes down as a guard of the program by which code it would run: a program
        # exported with 16 images then refuses fewer.
        quiet = nullcontext() if sizes is None else sizes.suppress_guards()
        with self._fake_mode, torch.no_grad(), quiet:
            node.meta["val"] = target(*values)
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Lets every user of one node use another instead."""
        old.replace_all_uses_with(new)

    def finish(self) -> ExportedProgram:
        """Returns the program."""
        self.graph.eliminate_dead_code()
        for node in list(self._state):
            if not node.users:
                self.graph.erase_node(node)
                del self._state[node], self._specs[node]
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        specs = [self._specs[node] for node in placeholders]
        outputs = _output_specs(self._program, self.graph)
        signature = type(self._program.graph_signature)(specs, outputs)
        self.graph.lint()
        state_dict: dict[str, Tensor] = {}
        constants: dict[str, Any] = {}
        for node, value in self._state.items():
            spec = self._specs[node]
            kept = spec.kind == InputKind.CONSTANT_TENSOR or spec.persistent is False
            (constants if kept else state_dict)[str(spec.target)] = value
        for spec in specs:
            if spec.kind == InputKind.CUSTOM_OBJ:
                constants[spec.target] = self._program.constants[spec.target]
        return ExportedProgram(
            self._module,
            self.graph,
            signature,
            state_dict,
            self._program.range_constraints,
            copy.copy(self._program.module_call_graph),
            self._program.example_inputs,
            constants,
            verifiers=self._program.verifiers,
        )


def _output_specs(program: ExportedProgram, graph: fx.Graph) -> list[Any]:
    """The old output specs, with the names of the nodes that are returned now."""
    (returned,) = next(node for node in graph.nodes if node.op == "output").args
    specs = []
    values: Sequence[Any] = returned
    for spec, value in zip(program.graph_signature.output_specs, values, strict=True):
        argument = TensorArgument(value.name) if isinstance(spec.arg, TensorArgument) else spec.arg
        specs.append(type(spec)(spec.kind, argument, spec.target))
    return specs


def _fake_mode_of(placeholders: Sequence[Node]) -> FakeTensorMode:
    for node in placeholders:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    return FakeTensorMode()
