"""The deployed network: int8 layers on integers, the others in float32, in one pure function."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fquant_kernels
from fquant.affine import dequantize, quantize
from fquant.checks import require_no_derivative, values_readable
from fquant.records import QTensor
from fquant.sparse import SparseTensor, global_avg_pool, max_pool, sparse_conv_int8
from fquant.sparse.conv import outputs
from fquant.sparse.kernel_map import KernelMap
from fquant.sparse_network.layer import (
    NETWORK_INPUT,
    Layer,
    check_layers,
    convolutions,
    with_inputs,
)
from fquant.sparse_network.maps import Maps, first_key, geometries, require_cells
from fquant.sparse_network.module import Value, concatenated, on_features
from fquant.sparse_network.sites import (
    ACTIVATION,
    WEIGHT,
    integer_joins,
    quantized_values,
    tied_values,
    value_scale_name,
    weight_scale_name,
)


class Deployed(NamedTuple):
    """What an int8 network is made of; a pytree.

    Attributes:
        params: `{layer}.weight` as QTensor of the int8 layers and float32 of the others, and
            `{layer}.bias`, float32.
        scales: the step of each value on an int8 grid, 0-d.
    """

    params: dict[str, Tensor | QTensor]
    scales: dict[str, Tensor]


def to_int8(
    layers: Sequence[Layer],
    int8: Collection[str],
    params: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
) -> Deployed:
    """Returns the deployed network: the weights of the layers in `int8` as integers.

    Args:
        layers: the network.
        int8: names of convolutions.
        params: parameters without batch norm (`fold_network`), trained or not.
        scales: from `tie_scales`.

    Raises:
        ValueError: a layer has a batch norm left, params or scales lack one that is needed, or values
            that are read side by side have different scales (checked in eager code).
    """
    normed = sorted(name for name in params if ".norm." in name)
    if normed:
        raise ValueError(
            f"to_int8: params must be without batch norm (fold_network), got {normed}."
        )
    absent = sorted(
        f"{n}.weight" for n in {*int8, *convolutions(layers)} if f"{n}.weight" not in params
    )
    if absent:
        raise ValueError(
            "to_int8: params must have the weight of every layer, by its name in layers "
            f"(Listed.params(state) of list_layers, or fold_network), lacks {absent}."
        )
    values = quantized_values(layers, int8)
    wanted = [*map(weight_scale_name, int8), *map(value_scale_name, values)]
    missing = sorted(name for name in wanted if name not in scales)
    if missing:
        raise ValueError(f"to_int8: scales must have every quantizer, lacks {missing}.")
    for group in tied_values(layers, int8):
        steps = [scales[value_scale_name(value)].detach().reshape(()) for value in sorted(group)]
        if values_readable(*steps) and any(step != steps[0] for step in steps):
            raise ValueError(
                "to_int8: scales must be equal where values are read side by side, as tie_scales makes "
                f"them, got {[step.item() for step in steps]} of {sorted(group)}."
            )
    deployed: dict[str, Tensor | QTensor] = {name: p.detach() for name, p in params.items()}
    for name in int8:
        weight = params[f"{name}.weight"].detach()
        step = scales[weight_scale_name(name)].detach()
        deployed[f"{name}.weight"] = quantize(weight, step, spec=WEIGHT)
    return Deployed(deployed, {v: scales[value_scale_name(v)].detach().reshape(()) for v in values})


def int8_network(
    layers: Sequence[Layer], int8: Collection[str], *, with_values: bool = False
) -> Callable[[Deployed, SparseTensor, Maps], Any]:
    """Returns `f(deployed, x, maps) -> output`: the network as deployed.

    A layer of `int8` is one fused integer op with residual and ReLU. A layer in floating point reads
    dequantized values, and its result is quantized where int8 layers read it. Max pools pick integers.
    The integers are those of `fake_quant` of the same plan, but for sums that fall next to the middle
    between two. It compiles with `fullgraph=True`, in one graph for every number of cells.

    Args:
        layers: the network.
        int8: names of convolutions.
        with_values: return `(output, values)` with every layer's result and the input, by name.

    Returns:
        A function of `to_int8`'s record, a SparseTensor of float32 features, and `make_maps(layers, x)`,
        on a CPU rather `make_maps(layers, x, pairs=True)`: the same result, sooner.

    Raises:
        ValueError: layers are no network, or int8 names no convolution of it; (when called) x does not
            fit the first layer, or maps are of other cells.
        RuntimeError: (when called) under a derivative of `torch.func` by the features.
    """
    check_layers(layers)
    steps = tuple(with_inputs(layers))
    keys = {name: geometry.key for name, geometry in geometries(layers).items()}
    quantized = quantized_values(layers, int8)
    joins = integer_joins(layers, int8)
    entry = first_key(layers)
    last_reader = {
        name: layer.name
        for layer in steps
        for name in (*layer.inputs, *filter(None, [layer.residual]))
    }

    def kept(name: str, value: Value, deployed: Deployed) -> Value:
        if name not in quantized or isinstance(value.features, QTensor):
            return value
        return quantize(value, deployed.scales[name], spec=ACTIVATION)

    def forward(deployed: Deployed, x: SparseTensor, maps: Maps) -> Any:
        require_cells("int8_network", x, maps, entry)
        if isinstance(x.features, Tensor):
            require_no_derivative("int8_network", x.features)
        values: dict[str, Value] = {NETWORK_INPUT: kept(NETWORK_INPUT, x, deployed)}
        for layer in steps:
            kernel_map = maps[keys[layer.name]] if layer.name in keys else None
            read = _joined([values[name] for name in layer.inputs], layer.name in joins)
            residual = values[layer.residual] if layer.residual else None
            y = _run(layer, deployed, read, kernel_map, residual)
            values[layer.name] = kept(layer.name, y, deployed)
            if not with_values:  # what nobody will read any more need not take memory
                done = [name for name in values if last_reader.get(name) == layer.name]
                for name in done:
                    del values[name]
        output = values[steps[-1].name]
        return (output, values) if with_values else output

    return forward


def _run(
    layer: Layer,
    deployed: Deployed,
    x: Value,
    kernel_map: KernelMap | None,
    residual: SparseTensor | None,
) -> Value:
    if layer.op == "max_pool":
        return max_pool(x, layer.kernel_size, kernel_map=kernel_map)
    if layer.op == "global_avg_pool":
        return global_avg_pool(_float(x), count_absent=False)
    weight, bias = deployed.params[f"{layer.name}.weight"], deployed.params[f"{layer.name}.bias"]
    assert isinstance(bias, Tensor)
    if layer.op == "linear":
        return on_features(lambda f: F.linear(f, weight, bias), _float(x))  # type: ignore[arg-type]
    assert kernel_map is not None
    if isinstance(weight, QTensor):
        return sparse_conv_int8(
            x,
            weight,
            bias,
            kernel_map=kernel_map,
            output_scale=deployed.scales.get(layer.name),
            residual=residual,
            relu=layer.relu,
        )
    features = fquant_kernels.sparse_conv_float(
        _float(x).features, weight.flatten(1, -2), kernel_map.neighbors, bias
    )
    if residual is not None:
        features = features + _float(residual).features
    return outputs(kernel_map, features.relu() if layer.relu else features)


def _joined(values: Sequence[Value], as_integers: bool) -> Value:
    if len(values) == 1:
        return values[0]
    if not as_integers:
        return concatenated([_float(v) for v in values])
    first: Any = values[0].features
    q = torch.cat([v.features.q for v in values], dim=1)
    return values[0].with_features(QTensor(q, first.scale, spec=first.spec, dtype=first.dtype))


def _float(x: Value) -> Value:
    return dequantize(x) if isinstance(getattr(x, "features", None), QTensor) else x
