"""A sparse network in int8 as a network card, for a file that other engines can read."""

from collections.abc import Sequence
from typing import Any

from fquant.records import QTensor
from fquant.serialization.network_card import CardLayer, CardMap, NetworkCard, network_card
from fquant.sparse_network.int8 import Deployed
from fquant.sparse_network.layer import Layer, with_inputs
from fquant.sparse_network.maps import MapRecipe, geometries


def card_of_network(layers: Sequence[Layer], deployed: Deployed) -> NetworkCard:
    """Returns the card of a network whose convolutions are all int8.

    `fquant.serialization.run_card` gives what `int8_network` gives, bit for bit.

    Args:
        layers: the network.
        deployed: from `to_int8` with `convolutions(layers)`.

    Raises:
        ValueError: a convolution is in floating point, or joined inputs have several scales.

    Example:
        >>> from fquant.sparse_network import Layer
        >>> weight = fquant.quantize(torch.ones(2, 3, 1), 0.5)
        >>> deployed = Deployed(
        ...     {"a.weight": weight, "a.bias": torch.zeros(2)}, {"input": torch.tensor(0.1)}
        ... )
        >>> card_of_network([Layer("a", "subm", (1, 2))], deployed).maps
        (CardMap(key='input/subm3', op='subm', source='input', kernel_size=(3,), stride=(),
        padding=(), dilation=(1,), output_padding=()),)
    """
    recipes = geometries(layers)
    weights = {
        name.removesuffix(".weight"): tensor
        for name, tensor in deployed.params.items()
        if name.endswith(".weight")
    }
    floats = [x.name for x in layers if x.is_convolution and not _is_int8(weights.get(x.name))]
    if floats:
        raise ValueError(f"card_of_network: convolutions must all be int8, got {floats} in float.")
    axes = next(len(weight.shape) - 2 for weight in weights.values() if _is_int8(weight))
    card: list[CardLayer] = []
    for layer in with_inputs(layers):
        inputs = layer.inputs
        if len(inputs) > 1:
            inputs = (f"{layer.name} inputs",)
            card.append(CardLayer(inputs[0], "cat", layer.inputs))
        key = recipes[layer.name].key if layer.name in recipes else None
        relu = layer.is_convolution and layer.relu
        op = "conv" if layer.is_convolution else layer.op
        card.append(CardLayer(layer.name, op, inputs, key, layer.residual or None, relu))
    return network_card(
        list({recipe.key: _card_map(recipe, axes) for recipe in recipes.values()}.values()),
        card,
        weights,
        {n.removesuffix(".bias"): b for n, b in deployed.params.items() if n.endswith(".bias")},  # type: ignore[misc]
        deployed.scales,
    )


def _is_int8(weight: Any) -> bool:
    return isinstance(weight, QTensor)


def _card_map(recipe: MapRecipe, axes: int) -> CardMap:
    kernel, stride, padding, dilation = (
        (size,) * axes if isinstance(size, int) else size
        for size in (recipe.kernel_size, recipe.stride, recipe.padding, recipe.dilation)
    )
    if recipe.kind == "inverse":
        return CardMap(recipe.key, "inverse", recipe.reads)
    if recipe.kind == "subm":
        return CardMap(recipe.key, "subm", recipe.reads, kernel, dilation=dilation)
    return CardMap(recipe.key, "conv", recipe.reads, kernel, stride, padding, dilation)
