"""`card_of_program`: a lowered sparse network as a network card."""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from fquant.graph import qdq_ops
from fquant.graph.editor import Editor
from fquant.graph.pattern import aten
from fquant.records import QTensor
from fquant.serialization.network_card import INPUT, CardLayer, CardMap, NetworkCard, network_card
from fquant.sparse import KernelMap, SparseTensor
from fquant.sparse.geometry import Geometry, inverse_name
from fquant.spec import INT8

OUTPUT_SCALE = "fquant.output_scale"  # key of the metadata of a lowered sparse convolution

ops = torch.ops.fquant


def card_of_program(program: ExportedProgram) -> NetworkCard:
    """Returns the card of a sparse network that `lower` returned, or that was saved and loaded again.

    `fquant.serialization.run_card` gives what the program gives, bit for bit. Kernel sizes, strides and
    the rest are those of the kernel maps among the program's arguments, which it has in their names;
    the cells of each are taken to be those that its layer reads, as the network's own maps are.

    The program has `s_x * s_w / s_y` and `bias / s_y` of each layer; s_w and bias are worked out as
    floats that give these again. Channels with a negative step (of a batch norm) get the opposite
    weights and step.

    Args:
        program: takes one SparseTensor of float features and kernel maps. Its layers are convolutions
            with residual and ReLU, max pools and joined channels, all in int8 but for the last result.

    Raises:
        ValueError: a step is something else, or a map is no argument or was not built by `subm_map`,
            `conv_map`, `transposed_conv_map` or `transpose_map`; the message names it.

    Example:
        >>> class Model(torch.nn.Module):
        ...     def forward(self, x, kernel_map):
        ...         return fquant.sparse.subm_conv(x, torch.ones(2, 3, 1), kernel_map=kernel_map)
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[1.0, 0.0, 2.0]]]))
        >>> args = (x, fquant.sparse.subm_map(x, 3, dilation=2))
        >>> plan = fquant.make_plan(Model(), fquant.w8a8(), args)
        >>> stats = fquant.calibrate_model(Model(), plan, {}, [args], progress=False)
        >>> program = fquant.export_qdq(Model(), plan, {}, fquant.finalize(plan, stats), args)
        >>> card_of_program(fquant.lower(program).program).maps
        (CardMap(key='input/subm k3 d2', op='subm', source='input', kernel_size=(3,), stride=(),
        padding=(), dilation=(2,), output_padding=()),)
    """
    return _Reader(program).card()


class _Value(NamedTuple):
    """A layer's result: its name, its step, and the map that made its cells ("input" at first)."""

    name: str
    scale: Tensor | None
    cells: str


class _Reader:
    def __init__(self, program: ExportedProgram) -> None:
        self.editor = Editor(program)
        nodes = self.editor.graph.nodes
        given = [n for n in nodes if n.op == "placeholder" and not self.editor.constant(n)]
        self.features: list[Node] = []
        self.kernel_maps: dict[Node, KernelMap] = {}  # by their neighbors
        records = pytree.tree_unflatten(given, program.call_spec.in_spec)
        pytree.tree_map(lambda leaf: leaf, records, is_leaf=self.note)
        self.values: dict[Node, _Value] = {}
        self.maps: dict[str, CardMap] = {}
        self.geometries: dict[str, str] = {}
        self.layers: list[CardLayer] = []
        self.weights: dict[str, QTensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}

    def note(self, record: Any) -> bool:
        if isinstance(record, SparseTensor):
            node: Any = record.features  # records of nodes in place of tensors
            self.features.append(node)
        elif isinstance(record, KernelMap):
            node = record.neighbors
            self.kernel_maps[node] = record
        return isinstance(record, KernelMap)

    def card(self) -> NetworkCard:
        output: Any = None
        for node in self.editor.graph.nodes:
            if node.op == "output":
                output = [self.values[n] for n in node.all_input_nodes if n in self.values]
            elif node.op == "call_function":
                self.read(node)
        last = self.layers[-1].name if self.layers else INPUT
        if [value.name for value in output] != [last]:
            raise ValueError(
                f"card_of_program: the program must return its last layer's result, that of {last!r}, "
                f"got {[value.name for value in output]}."
            )
        maps = list(self.maps.values())
        return network_card(maps, self.layers, self.weights, self.biases, self.scales)

    def read(self, node: Node) -> None:
        reads = [self.values[n] for n in node.all_input_nodes if n in self.values]
        if node.target is qdq_ops.quantize and node.args[0] in self.features:
            scale = self.editor.value(node.args[1])
            if INPUT in self.scales or qdq_ops.quantization_of(node).format != INT8:
                self.refuse(node, "a single int8 grid of the input")
            self.add(node, INPUT, scale, INPUT)
        elif node.target is ops.sparse_conv_int8.default:
            self.conv(node)
        elif node.target is ops.sparse_max_pool.default:
            key, cells = self.map(node, node.args[1], reads[0].cells)
            self.layers.append(CardLayer(node.name, "max_pool", (reads[0].name,), key))
            self.values[node] = _Value(node.name, reads[0].scale, cells)
        elif node.target is aten.cat.default and reads:
            joined: Any = node.args[0]
            names = tuple(self.values[n].name for n in joined if n in self.values)
            if len(names) != len(joined) or len({value.cells for value in reads}) != 1:
                self.refuse(node, "a concatenation of results at the same cells")
            self.layers.append(CardLayer(node.name, "cat", names))
            self.values[node] = _Value(node.name, reads[0].scale, reads[0].cells)
        elif node.target is qdq_ops.dequantize and reads:
            self.values[node] = reads[0]._replace(scale=None)
        elif reads and node.target is not aten.sym_size.int:
            self.refuse(node, f"a sparse convolution, max pool or cat of int8 ({node.target})")

    def conv(self, node: Node) -> None:
        arguments: Any = node.args
        x, q, neighbors, multiplier, offset, residual, residual_step, relu, dtype = arguments
        source = self.values.get(x)
        if source is None or source.scale is None:
            self.refuse(node, "a convolution of int8 results")
        in_scale = source.scale
        out_scale = None
        if dtype == torch.int8:
            text = node.meta.get("custom", {}).get(OUTPUT_SCALE)
            if text is None:
                self.refuse(node, "one that `lower` made, with the step of its result")
            out_scale = torch.tensor(text)
        key, cells = self.map(node, neighbors, source.cells)
        head, _, tail = multiplier.name.removeprefix("b_lowered_").rpartition("_scale")
        name = head + tail

        def per_output(value: Tensor) -> Tensor:
            return value if out_scale is None else value / out_scale

        step, weight = self.editor.value(multiplier), self.editor.value(q)
        step = self.solved(node, step, lambda s: per_output(in_scale * s))
        if bool((weight[step < 0] == INT8.q_min).any()):
            self.refuse(node, "one whose channels of negative step have no weight of -128")
        sign = step.sign().to(torch.int8).view(-1, *[1] * (weight.ndim - 1))
        kernel = self.kernel_maps[neighbors].kernel_size
        weight = torch.where(sign < 0, -weight, weight).unflatten(1, kernel)
        scale = step.abs().view(-1, *[1] * (weight.ndim - 1))
        self.weights[name] = QTensor(weight, scale, spec=INT8)
        if offset is not None:
            self.biases[name] = self.solved(node, self.editor.value(offset), per_output)
        added = None
        if residual is not None:
            added = self.values.get(residual)
            step_of_added = None if added is None or added.cells != cells else added.scale
            if step_of_added is None or per_output(step_of_added) != self.editor.value(
                residual_step
            ):
                self.refuse(node, "one with a residual of int8 results at the cells that it writes")
        named = None if added is None else added.name
        self.layers.append(CardLayer(name, "conv", (source.name,), key, named, bool(relu)))
        self.add(node, name, out_scale, cells)

    def add(self, node: Node, name: str, scale: Tensor | None, cells: str) -> None:
        self.values[node] = _Value(name, scale, cells)
        if scale is not None:
            self.scales[name] = scale

    def map(self, node: Node, neighbors: Any, here: str) -> tuple[str, str]:
        """Returns (the map's key, the key of the cells that it writes); adds it to the card's maps."""
        kernel_map = self.kernel_maps.get(neighbors)
        if kernel_map is None or not kernel_map.geometry:
            self.refuse(
                node, "one by a kernel map among the arguments, built by a function of a map"
            )
        name = kernel_map.geometry
        if name.startswith("inverse "):
            if self.geometries.get(here) != inverse_name(name):
                self.refuse(
                    node, f"one by the inverse of the map that made its cells, not {name!r}"
                )
            key = f"{here}/inverse"
            self.maps[key] = CardMap(key, "inverse", here)
            return key, self.maps[here].source
        key, geometry = f"{here}/{name}", Geometry.of_name(name, len(kernel_map.kernel_size))
        self.geometries[key] = name
        if geometry.kind == "subm":  # stride and padding follow from the rest
            size, spacing = geometry.kernel_size, geometry.dilation
            self.maps[key] = CardMap(key, "subm", here, size, dilation=spacing)
            return key, here
        sizes = (*geometry.sizes, geometry.output_padding)
        self.maps[key] = CardMap(key, geometry.kind, here, *sizes)
        return key, key

    def solved(self, node: Node, result: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns float32 values of which a linear function gives the result, bit for bit."""
        guess = (result.double() / linear(torch.ones((), dtype=torch.float64))).float()
        found = guess
        for direction in (-torch.inf, torch.inf):
            near = guess
            for _ in range(4):
                found = torch.where(linear(found) == result, found, near)
                near = torch.nextafter(near, torch.tensor(direction))
        if not torch.equal(linear(found), result):
            self.refuse(node, "one whose constants are those of a step and bias in float32")
        return found

    def refuse(self, node: Node, requirement: str) -> NoReturn:
        raise ValueError(f"card_of_program: step {node.name!r} must be {requirement}.")
