"""Sharing ranges between neighbours, so that one grid serves channels of very different size.

    equalize            between a layer's input and its weight, in the scales; any model, by its plan
    equalize_layers     between one layer's outputs and the next one's inputs, in the parameters

Both leave the float function as it is, but for rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fquant.plan import Operand, Plan, Site
from fquant.qstate import State
from fquant.scales import compute_amax, compute_scale

# Channels that are always zero have no range to share; their factor must not be zero either.
SMALLEST = 1e-5
PAIRS = {"weight": "input", "weight_ih": "input", "weight_hh": "hidden"}


@dataclass(frozen=True)
class _Pair:
    """A weight and the activation it multiplies, both with their quantizers' names."""

    weight: Operand
    weight_name: str
    input: Operand
    input_name: str


def equalize(
    plan: Plan, params: Mapping[str, Tensor], qstate: State, strength: float = 0.5
) -> dict[str, Tensor]:
    """Returns qstate with the ranges of inputs per channel shared between inputs and weights.

    For every layer whose input has a scale per channel (`Quantizer(per="channel")`), which integer
    arithmetic cannot sum over, and whose weight has one per output channel:

        factor[c] = amax_x[c]^strength / amax_w[c]^(1 - strength)
        scale_x[c] = factor[c] max_c(amax_x[c] / factor[c]) / q_max
        scale_w[o, c] = max_c(|w[o, c]| factor[c]) / q_max / factor[c]

    These are the scales of `x / factor` per tensor and of `w * factor` per output channel. The float
    function is as it was; `scale_x[c] scale_w[o, c]` no longer depends on c, so the product is summed
    in integers. A deployment divides by factor where it rounds the input (scales per channel in the
    layer before), and keeps `w * factor` as its weight. Depthwise convolutions are left alone: their
    outputs read one channel each, so that scales per channel fold as they are.

    Args:
        plan: with inputs per channel where ranges are to be shared.
        params: the weights, by name.
        qstate: from `fquant.finalize(plan, stats)`.
        strength: 0 makes the channels of the weight alike, 1 those of the input; choose it by what it
            does to calibration data.

    Raises:
        ValueError: strength is outside [0, 1]; no layer has an input per channel; a weight is no
            parameter, or its layout is none of a linear layer, convolution or recurrent layer. The
            message names the site.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> params = {"weight": torch.tensor([[1.0, 0.01]])}
        >>> x = torch.tensor([[0.01, 1.0]])
        >>> inputs = fquant.Quantizer(per="channel")
        >>> plan = fquant.make_plan(model, [fquant.OpRule(weight=inputs, inputs=inputs)], (x,))
        >>> stats = fquant.calibrate_model(model, plan, params, [x])
        >>> shared = equalize(plan, params, fquant.finalize(plan, stats))
        >>> shared["linear#0.input"] * shared["linear#0.weight"] * 127**2   # one product for both
        tensor([[0.0100, 0.0100]])

    References:
        Xiao et al. 2023, SmoothQuant, arXiv 2211.10438, section 4; Nagel et al. 2019, arXiv 1906.04721.
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"equalize: strength must be from 0 to 1, got {strength}.")
    shared = dict(qstate)
    found = False
    for site in plan.sites:
        for pair in _pairs_of(site):
            found = True
            weight = params.get(pair.weight.parameter or "")
            if weight is None:
                raise ValueError(
                    f"equalize: site {site.name!r} must have a parameter as weight, "
                    f"got {pair.weight.parameter!r}."
                )
            shared.update(_shared(pair, weight, qstate, strength))
    if not found:
        raise ValueError(
            "equalize: plan must have a layer whose input has a scale per channel "
            "(Quantizer(per='channel')), got none."
        )
    return shared


def _pairs_of(site: Site) -> list[_Pair]:
    operands = {operand.role: operand for operand in site.operands}
    pairs = []
    for role, partner in PAIRS.items():
        weight, x = operands.get(role), operands.get(partner)
        if weight is None or x is None or weight.quantizer is None or x.quantizer is None:
            continue
        if x.quantizer.per != "channel" or x.quantizer.dynamic:
            continue
        if _reads_one_channel(weight):
            continue
        if weight.quantizer.spec.axis != 0 or weight.quantizer.groups != 1:
            raise ValueError(
                f"equalize: site {site.name!r} must have a weight of (outputs, inputs, ...) with a "
                f"scale per output, got {weight.quantizer}."
            )
        pairs.append(_Pair(weight, f"{site.name}.{role}", x, f"{site.name}.{partner}"))
    return pairs


def _reads_one_channel(weight: Operand) -> bool:
    return len(weight.shape) > 2 and weight.shape[1] == 1 and weight.quantizer.spec.axis == 0  # type: ignore[union-attr]


def _shared(pair: _Pair, weight: Tensor, qstate: State, strength: float) -> dict[str, Tensor]:
    x_scale = qstate[pair.input_name]
    x_amax = x_scale.detach().flatten() * pair.input.quantizer.spec.q_max  # type: ignore[union-attr]
    groups = len(x_amax) // weight.shape[1]  # a grouped convolution's weight has C / groups inputs
    by_group = weight.detach().reshape(groups, -1, *weight.shape[1:])
    w_amax = compute_amax(by_group, axis=(0, 2)).flatten()
    factor = x_amax.clamp(min=SMALLEST) ** strength
    factor = factor / w_amax.to(factor).clamp(min=SMALLEST) ** (1.0 - strength)
    spec = pair.weight.quantizer.spec  # type: ignore[union-attr]
    of_weight = factor.view(groups, 1, -1, *[1] * (weight.ndim - 2)).expand(
        -1, len(weight) // groups, -1, *[1] * (weight.ndim - 2)
    )
    of_weight = of_weight.reshape(len(weight), -1, *[1] * (weight.ndim - 2))
    scale = compute_scale(compute_amax(weight * of_weight.to(weight.dtype), axis=0), spec)
    return {
        pair.input_name: (factor * (x_scale.detach().flatten() / factor).max()).view(x_scale.shape),
        pair.weight_name: scale / of_weight.to(scale.dtype),
    }


def equalize_layers(
    model: nn.Module, params: Mapping[str, Tensor], pairs: Mapping[str, str]
) -> dict[str, Tensor]:
    """Returns params in which outputs of one layer and inputs of the next have like ranges.

        factor[c] = sqrt(r1[c] r2[c]) / r2[c],   r1, r2: amax of w1's output c and of w2's input c
        w1[c] / factor[c],   b1[c] / factor[c],   w2[:, c] * factor[c]

    The function is the same where what lies between the layers is positively homogeneous per channel:
    ReLU, LeakyReLU, max and average pools, nothing. Not ReLU6, GELU, or a batch norm: fold that first
    (`fold_batch_norm`), whose tensors then move with the layer's.

    Args:
        model: for the layers' kinds.
        params: parameters and buffers by name; new tensors take the place of those that change.
        pairs: `{path of a layer: path of the only layer that reads it}`; linear layers or
            convolutions, not transposed. A batch norm that was folded may be named with its layer,
            "conv norm", as the first of a pair.

    Raises:
        ValueError: a path names no such layer, or channels do not fit.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, False), torch.nn.Linear(1, 1, False))
        >>> params = {"0.weight": torch.tensor([[8.0]]), "1.weight": torch.tensor([[0.5]])}
        >>> equalize_layers(model, params, {"0": "1"})
        {'0.weight': tensor([[2.]]), '1.weight': tensor([[2.]])}

    References:
        Nagel et al. 2019, arXiv 1906.04721, section 4.1.
    """
    modules = dict(model.named_modules())
    equalized = dict(params)
    for first, second in pairs.items():
        layer, *norms = first.split(" ")
        for path in (layer, second):
            if not isinstance(modules.get(path), nn.Linear | nn.modules.conv._ConvNd) or getattr(
                modules[path], "transposed", False
            ):
                raise ValueError(
                    "equalize_layers: pairs must name linear layers or convolutions that are not "
                    f"transposed, got {path!r}."
                )
        w1, w2 = equalized[f"{layer}.weight"], equalized[f"{second}.weight"]
        groups = len(w1) // w2.shape[1]
        if len(w1) != groups * w2.shape[1]:
            raise ValueError(
                f"equalize_layers: {second!r} must read the {len(w1)} channels of {layer!r}, "
                f"got a weight of shape {tuple(w2.shape)}."
            )
        by_group = w2.reshape(groups, -1, *w2.shape[1:])
        r1 = compute_amax(w1, axis=0).flatten()
        r2 = compute_amax(by_group, axis=(0, 2)).flatten()
        factor = torch.where((r1 > 0) & (r2 > 0), (r1 / r2.clamp(min=SMALLEST)).sqrt(), 1.0)
        equalized[f"{layer}.weight"] = w1 / factor.view(-1, *[1] * (w1.ndim - 1))
        for name in (f"{layer}.bias", *(f"{n}.bias" for n in norms)):
            if name in equalized:
                equalized[name] = equalized[name] / factor
        inputs = factor.view(groups, 1, -1, *[1] * (w2.ndim - 2))
        equalized[f"{second}.weight"] = (by_group * inputs).reshape(w2.shape)
    return equalized
