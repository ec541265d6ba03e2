"""A model made of `fquant.sparse.nn` modules as a list of layers: what its int8 form is planned on.

The model is traced by torch.fx with its convolutions, norms and activations as single steps; what
stands between them is taken apart into batch norm behind a convolution, a residual sum, ReLU, and
joined channels. Records and their features are one in the trace, so forwards may take features out and
put others in, as those written for spconv do. The model itself is not run on data, and not written.
"""

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fquant.sparse import add_features, join_features
from fquant.sparse import nn as sparse_nn
from fquant.sparse.nn.convolution import SparseConv, SparseInverseConv, SubMConv
from fquant.sparse.nn.pooling import SparseMaxPool
from fquant.sparse_network.batch_norm import fold
from fquant.sparse_network.layer import NETWORK_INPUT, Layer, check_layers

NORMS = (nn.BatchNorm1d,)
RELUS = (nn.ReLU, sparse_nn.SparseReLU)
RELU_FUNCTIONS = (torch.relu, nn.functional.relu)
ADD_FUNCTIONS = (add_features, operator.add, torch.add)
SAME = (nn.Identity, nn.Dropout, sparse_nn.SparseIdentity)


class Listed(NamedTuple):
    """A model as a list of layers.

    Attributes:
        layers: in the order of the model's forward.
        paths: `{layer: (path of its weight's module, path of its batch norm or None, eps)}`.
    """

    layers: tuple[Layer, ...]
    paths: dict[str, tuple[str, str | None, float]]

    def params(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the parameters of `SparseNetwork(layers, batch_norm=False)` from the model's state.

        Args:
            state: parameters and buffers of the model by name, trained or not.
        """
        found = {}
        for name, (conv, norm, eps) in self.paths.items():
            found[f"{name}.weight"], found[f"{name}.bias"] = fold(state, conv, norm, eps)
        return found


def list_layers(model: nn.Module) -> Listed:
    """Returns the layers of a model of `fquant.sparse.nn` modules that takes one SparseTensor.

    Convolutions (submanifold, strided, inverse), max pools, linear layers, batch norm (of
    inference), ReLU, `add_features` and `join_features` with their modules, in any nesting; sums and
    `torch.cat` of `x.features` too, put back by `x.replace_feature`, so models that `convert_spconv`
    made are listed as they are.

    Raises:
        ValueError: the model does something else, or in an order that no layer has; the message
        names it.

    Example:
        >>> model = fquant.sparse.models.MinkUNet(4, 3, widths=(8, 16, 8))
        >>> listed = list_layers(model)
        >>> [layer.name for layer in listed.layers][:3]
        ['stem_0_0', 'stem_1_0', 'down_0_0_0']
        >>> next(layer for layer in listed.layers if layer.residual).residual
        'down_0_1_downsample_0'
    """
    graph = _Tracer().trace(model)
    modules = dict(model.named_modules())
    arguments = [n.name for n in graph.nodes if n.op == "placeholder" and not n.args]
    if len(arguments) != 1:
        raise ValueError(
            "list_layers: model must take one SparseTensor, got one that takes "
            f"{arguments or 'nothing'}. Give it the part that does."
        )
    state = _State(modules)
    for node in graph.nodes:
        if node.op == "output":
            break
        state.read(node)
    layers = tuple(state.layers.values())
    check_layers(layers)
    output = state.values[node.args[0]]
    if output != (layers[-1].name,):
        raise ValueError(
            f"list_layers: the model's result must be its last layer's, got that of {output}."
        )
    return Listed(layers, state.paths)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_functions=(add_features, join_features))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaves = (sparse_nn.SparseConvolution, sparse_nn.SparsePool, *NORMS, *RELUS, *SAME)
        return isinstance(m, leaves) or super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, nn.Module):  # x.map(module)
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        if any(a is function for function in RELU_FUNCTIONS):  # x.map(torch.relu)
            return a
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Record(node, self)


class _Record(fx.Proxy):
    """A record, which stands for its features as well."""

    @property
    def features(self) -> fx.Proxy:
        return self

    def replace_feature(self, features: fx.Proxy) -> fx.Proxy:
        return features

    with_features = replace_feature


class _State:
    """Layers so far, and for each traced value the layers whose results it holds side by side."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules: dict[str, Any] = modules  # of kinds that `layer` tells apart
        self.layers: dict[str, Layer] = {}
        self.paths: dict[str, tuple[str, str | None, float]] = {}
        self.values: dict[fx.Node, tuple[str, ...]] = {}
        self.undone: dict[str, str] = {}  # name of the convolution by its indice_key

    def read(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.values[node] = (NETWORK_INPUT,)
        elif node.op == "call_module":
            self.values[node] = self.module(node, str(node.target), node.args[0])
        elif node.op == "call_method" and node.target == "map":
            function = node.args[1]
            if isinstance(function, fx.Node) and function.op == "get_attr":
                self.values[node] = self.module(node, str(function.target), node.args[0])
            elif function in RELU_FUNCTIONS:
                self.values[node] = self.relu(node, node.args[0])
            else:
                self.refuse(node, f"map of {function}")
        elif node.op == "call_function" and node.target is join_features:
            self.values[node] = self.joined(node.args)
        elif node.op == "call_function" and node.target is torch.cat:
            if (*node.args[1:], *node.kwargs.values()) not in ((1,), (-1,)):
                self.refuse(node, "a concatenation of other than channels")
            self.values[node] = self.joined(node.args[0])
        elif node.op == "call_function" and node.target in ADD_FUNCTIONS:
            self.values[node] = self.add(node)
        elif node.op == "call_function" and node.target in RELU_FUNCTIONS:
            self.values[node] = self.relu(node, node.args[0])
        elif node.op != "get_attr":
            self.refuse(node, str(node.target))

    def module(self, node: fx.Node, path: str, source: Any) -> tuple[str, ...]:
        module, inputs = self.modules[path], self.values[source]
        if isinstance(module, SAME):
            return inputs
        if isinstance(module, RELUS):
            return self.relu(node, source)
        if isinstance(module, NORMS):
            layer = self.unfinished(node, source, "batch norm")
            conv, norm, _ = self.paths[layer.name]
            if norm is not None or layer.residual:
                self.refuse(node, "batch norm that does not follow a convolution")
            if module.running_mean is None:
                self.refuse(node, "batch norm without running statistics")
            self.paths[layer.name] = (conv, path, module.eps)
            return inputs
        name = path.replace(".", "_")
        self.layers[name] = self.layer(node, name, module, inputs)
        if hasattr(module, "weight"):
            self.paths[name] = (path, None, 0.0)
        key = getattr(module, "indice_key", None)
        if key and not isinstance(module, SparseInverseConv | SubMConv):
            self.undone[key] = name
        return (name,)

    def layer(self, node: fx.Node, name: str, module: Any, inputs: tuple[str, ...]) -> Layer:
        if isinstance(module, nn.Linear):
            channels = (module.in_features, module.out_features)
            return Layer(name, "linear", channels, inputs=inputs, relu=False)
        if isinstance(module, SparseMaxPool):
            g = module.geometry
            kernel, stride, padding, spacing = map(_short, g.sizes)
            sizes = (kernel, stride, padding, spacing)
            return Layer(name, "max_pool", (0, 0), *sizes, inputs, relu=False)
        if not isinstance(module, SubMConv | SparseConv | SparseInverseConv):
            self.refuse(node, type(module).__name__)
        channels = (module.in_channels, module.out_channels)
        kernel = _short(module.kernel_size)
        if isinstance(module, SparseInverseConv):
            key = str(module.indice_key)
            if key not in self.undone:
                self.refuse(node, f"the inverse of {key!r}, which no layer before has")
            undoes = self.undone[key]
            return Layer(
                name, "inverse", channels, kernel, inputs=inputs, relu=False, undoes=undoes
            )
        g = module.geometry
        if isinstance(module, SubMConv):
            spacing = _short(g.dilation)
            return Layer(name, "subm", channels, kernel, 1, 0, spacing, inputs, relu=False)
        _, stride, padding, spacing = map(_short, g.sizes)
        return Layer(name, "conv", channels, kernel, stride, padding, spacing, inputs, relu=False)

    def relu(self, node: fx.Node, source: Any) -> tuple[str, ...]:
        layer = self.unfinished(node, source, "ReLU")
        self.layers[layer.name] = replace(layer, relu=True)
        return (layer.name,)

    def joined(self, nodes: Any) -> tuple[str, ...]:
        return tuple(value for node in nodes for value in self.values[node])

    def add(self, node: fx.Node) -> tuple[str, ...]:
        """The later of two convolutions takes the other value as its residual."""
        if len(node.args) != 2 or node.kwargs or any(a not in self.values for a in node.args):
            self.refuse(node, f"a sum of {node.args}, {node.kwargs}")
        order = {name: i for i, name in enumerate(self.layers)}
        a, b = sorted(node.args, key=lambda arg: order.get(self.values[arg][0], -1))  # type: ignore[index]
        layer = self.unfinished(node, b, "a sum")
        other = self.values[a]  # type: ignore[index]
        if len(other) != 1 or layer.residual:
            self.refuse(node, "a sum of joined values, or of three")
        self.layers[layer.name] = replace(layer, residual=other[0])
        return (layer.name,)

    def unfinished(self, node: fx.Node, source: Any, what: str) -> Layer:
        """Returns the convolution whose result this is, if nothing else reads it, ReLU least of all."""
        names = self.values[source]
        layer = self.layers.get(names[0])
        if len(names) != 1 or layer is None or not layer.is_convolution or layer.relu:
            self.refuse(node, f"{what} of {names}, which is no convolution's result")
        if len(source.users) != 1:
            self.refuse(node, f"{what} of {names}, which others read as well")
        return layer  # type: ignore[return-value]  # refuse raises

    def refuse(self, node: fx.Node, what: str) -> None:
        raise ValueError(f"list_layers: step {node.name!r} must be a layer's, got {what}.")


def _short(sizes: tuple[int, ...]) -> int | tuple[int, ...]:
    return sizes[0] if len(set(sizes)) == 1 else sizes
