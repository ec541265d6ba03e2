"""Quantizing the network: what, with which ranges, as fake quantization and as int8."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from fquant.affine import fake_quantize, quantize
from fquant.calibration import calibrate, observed_amax
from fquant.demo.data import Batch, Split, shuffled_batches
from fquant.demo.network import SITES, DigitNet
from fquant.demo.training import BATCH_SIZE, Params
from fquant.observers import MaxObserver
from fquant.params import fake_quant_params, param_scales, quantize_params
from fquant.records import QTensor
from fquant.rules import Rule, assign_specs
from fquant.scales import compute_scale
from fquant.sparse import KernelMap, SparseTensor, sparse_conv_int8
from fquant.spec import QuantSpec

ACTIVATION = QuantSpec(num_bits=8)
RULES = [Rule(r".*\.weight", QuantSpec(num_bits=8, narrow_range=True, axis=0)), Rule(".*", None)]
OBSERVERS = {site: MaxObserver() for site in SITES}


class Scales(NamedTuple):
    """The steps of weights (by parameter name) and activations (by site): all that quantizing adds."""

    weights: dict[str, Tensor]
    activations: dict[str, Tensor]


def activations_of(model: DigitNet, params: Params, batch: Batch) -> dict[str, Tensor]:
    """Returns the features at every site of the float network."""
    seen: dict[str, Tensor] = {}

    def record(name: str, x: SparseTensor) -> SparseTensor:
        seen[name] = _features(x)
        return x

    functional_call(model, params, (batch.x, batch.maps, record))
    return seen


def calibrate_scales(
    model: DigitNet, params: Params, split: Split, progress: bool | None
) -> Scales:
    """Returns steps from the largest weights per channel and the largest activations seen."""
    images = (split.train_images, split.train_labels)
    batches = list(shuffled_batches(*images, BATCH_SIZE, torch.Generator().manual_seed(2)))
    stats = calibrate(
        lambda batch: activations_of(model, params, batch), batches, OBSERVERS, progress=progress
    )
    amax = observed_amax(stats, OBSERVERS)
    return Scales(
        param_scales(params, assign_specs(params, RULES)),
        {site: compute_scale(value, ACTIVATION) for site, value in amax.items()},
    )


def fake_quant_forward(
    model: DigitNet, params: Params, scales: Scales, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns logits, and the fake-quantized features of every site."""
    seen: dict[str, Tensor] = {}

    def on_the_grid(name: str, x: SparseTensor) -> SparseTensor:
        y = fake_quantize(x, scales.activations[name], spec=ACTIVATION)
        seen[name] = _features(y)
        return y

    specs = assign_specs(params, RULES)
    rounded = fake_quant_params(params, specs, scales.weights)
    logits = functional_call(model, rounded, (batch.x, batch.maps, on_the_grid))
    return logits, seen


def to_int8(params: Params, scales: Scales) -> dict[str, Tensor | QTensor]:
    """Returns the deployed parameters: int8 weights with their steps, float32 biases."""
    return quantize_params(params, assign_specs(params, RULES), scales.weights)


def int8_forward(
    params: Mapping[str, Tensor | QTensor], steps: Mapping[str, Tensor], batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns logits, and the int8 features of every site; integers from the input to the last sum."""
    maps = batch.maps

    def conv(
        name: str,
        x: SparseTensor,
        kernel_map: KernelMap,
        residual: SparseTensor | None = None,
    ) -> SparseTensor:
        weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        assert isinstance(weight, QTensor)
        assert isinstance(bias, Tensor)
        last = name == "head"
        return sparse_conv_int8(
            x,
            weight,
            bias,
            kernel_map=kernel_map,
            output_scale=None if last else steps[name],
            residual=residual,
            relu=not last,
        )

    pixels = quantize(batch.x, steps["input"], spec=ACTIVATION)
    stem = conv("stem", pixels, maps.fine)
    block = conv("block", stem, maps.fine, residual=stem)
    down = conv("down", block, maps.fine_to_coarse)
    coarse = conv("coarse", down, maps.coarse)
    patch = conv("patch", coarse, maps.coarse_to_patch)
    logits = conv("head", patch, maps.patch_to_image).features
    layers = (pixels, stem, block, down, coarse, patch)
    return _tensor(logits), {site: _integers(x) for site, x in zip(SITES, layers, strict=True)}


def _features(x: SparseTensor) -> Tensor:
    return _tensor(x.features)


def _tensor(features: Tensor | QTensor) -> Tensor:
    assert isinstance(features, Tensor)
    return features


def _integers(x: SparseTensor) -> Tensor:
    assert isinstance(x.features, QTensor)
    return x.features.q
