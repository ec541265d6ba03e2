"""`SparseNetwork`: a list of layers as a module, for `functional_call` and the model level."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fquant.interception.stack import site
from fquant.sparse import SparseTensor, global_avg_pool, max_pool, sparse_conv
from fquant.sparse_network.layer import NETWORK_INPUT, Layer, Sizes, check_layers, with_inputs
from fquant.sparse_network.maps import Maps, first_key, geometries, require_cells

Value = Any  # a SparseTensor, or a tensor after a global pool


class SparseNetwork(nn.Module):
    """A list of layers with parameters `{layer}.weight`, `{layer}.bias`, `{layer}.norm.*`.

    Every value passes a site `{layer}/value` of operation "site", which is where its quantizer goes.

    Args:
        layers: the network, as `check_layers` wants it.
        axes: spatial axes of its input.
        batch_norm: whether every convolution but the last layer has a batch norm behind it, over rows.
        seed: of the initial weights (He et al. 2015).

    Raises:
        ValueError: layers are no network.

    Example:
        >>> layers = (Layer("stem", "subm", (1, 4)), Layer("head", "subm", (4, 2), 1, relu=False))
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.ones(1, 1, 5))
        >>> maps = fquant.sparse_network.make_maps(layers, x)
        >>> SparseNetwork(layers, axes=1)(x, maps).features.shape
        torch.Size([5, 2])
    """

    def __init__(
        self, layers: Sequence[Layer], axes: int = 3, *, batch_norm: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        check_layers(layers)
        self.layers = tuple(with_inputs(layers))
        self.map_keys = {name: geometry.key for name, geometry in geometries(layers).items()}
        self.first_key = first_key(layers)
        generator = torch.Generator().manual_seed(seed)
        self.input = Marked()
        last = self.layers[-1].name
        for layer in self.layers:
            if layer.is_convolution or layer.op == "linear":
                normed = batch_norm and layer.is_convolution and layer.name != last
                self.add_module(layer.name, WithWeight(layer, axes, normed, generator))

    def forward(self, x: SparseTensor, maps: Maps) -> Value:
        """Returns the last layer's result: a SparseTensor, or a tensor `(samples, channels)`."""
        require_cells("SparseNetwork", x, maps, self.first_key)
        values: dict[str, Value] = {NETWORK_INPUT: self.input(x)}
        for layer in self.layers:
            read: Value = concatenated([values[name] for name in layer.inputs])
            kernel_map = maps[self.map_keys[layer.name]] if layer.name in self.map_keys else None
            if layer.op == "max_pool":
                y: Value = max_pool(read, layer.kernel_size, kernel_map=kernel_map)
            elif layer.op == "global_avg_pool":
                y = global_avg_pool(read, count_absent=False)
            else:
                residual = values[layer.residual] if layer.residual else None
                y = self.get_submodule(layer.name)(read, kernel_map, residual)
            values[layer.name] = y
        return y


class Marked(nn.Module):
    """The site of the network's input."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        return site("value", x)


class WithWeight(nn.Module):
    """A convolution or linear layer with what follows it."""

    def __init__(self, layer: Layer, axes: int, normed: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer
        shape = weight_shape(layer, axes)
        spread = (2 / shape[1:].numel()) ** 0.5
        self.weight = nn.Parameter(torch.randn(shape, generator=generator) * spread)
        if normed:
            self.norm: nn.Module | None = nn.BatchNorm1d(shape[0])
        else:
            self.norm = None
            self.bias = nn.Parameter(torch.zeros(shape[0]))

    def forward(self, x: Value, kernel_map: Any, residual: Value | None) -> Value:
        if self.layer.op == "linear":
            return on_features(lambda f: F.linear(f, self.weight, self.bias), x)
        y = sparse_conv(x, self.weight, getattr(self, "bias", None), kernel_map=kernel_map)
        if self.norm is not None:
            y = y.map(self.norm)
        if residual is not None:
            y = y.with_features(y.features + residual.features)
        return site("value", y.map(torch.relu) if self.layer.relu else y)


def weight_shape(layer: Layer, axes: int) -> torch.Size:
    """Returns `(Cout, *kernel_size, Cin)`, or `(Cout, Cin)` for a linear layer."""
    cin, cout = layer.channels
    if layer.op == "linear":
        return torch.Size((cout, cin))
    return torch.Size((cout, *per_axis(layer.kernel_size, axes), cin))


def per_axis(size: Sizes, axes: int) -> tuple[int, ...]:
    """Returns one size per axis."""
    return (size,) * axes if isinstance(size, int) else size


def on_features(function: Any, x: Value) -> Value:
    """Returns function of a tensor, or of the features of a record, in place of them."""
    return function(x) if isinstance(x, Tensor) else x.map(function)


def concatenated(values: Sequence[Value]) -> Value:
    """Returns float values side by side, by channels."""
    if len(values) == 1:
        return values[0]
    return values[0].with_features(torch.cat([v.features for v in values], dim=1))
