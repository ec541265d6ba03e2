"""Parameter trees: `{name: tensor}` dicts, quantized name by name.

    specs  = assign_specs(params, rules)          static: which names, which grids
    scales = param_scales(params, specs)          one step per tensor or channel
    fake_quant_params(params, specs, scales)      float on the grid, differentiable
    quantize_params(params, specs, scales)        QTensor records; dequantize_params goes back

Names without a spec pass through as the same tensor objects.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fquant.affine import dequantize, fake_quantize, quantize
from fquant.records import QTensor
from fquant.scales import compute_amax, compute_scale
from fquant.spec import QuantSpec

Params = Mapping[str, Tensor]


def param_scales(params: Params, specs: Mapping[str, QuantSpec]) -> dict[str, Tensor]:
    """Returns the step of each name in specs, by the groups of its spec.

    Raises:
        ValueError: specs names a parameter that params does not have.
    """
    _require_names("param_scales", "specs", specs, params)
    return {n: compute_scale(compute_amax(params[n], s.axis, s.block), s) for n, s in specs.items()}


def fake_quant_params(
    params: Params,
    specs: Mapping[str, QuantSpec],
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Returns params with each name in specs fake-quantized; differentiable in params and scales.

    Args:
        params: `{name: tensor}`.
        specs: the grid of each name to quantize (`assign_specs`).
        scales: the step of each of these names; None to take them from params as they are now.

    Raises:
        TypeError: specs are no dict.
        ValueError: specs names a parameter, or scales lacks one, that the other has.

    Example:
        >>> params = {"weight": torch.tensor([[0.51, -1.27]]), "bias": torch.tensor([0.5])}
        >>> fake_quant_params(params, {"weight": QuantSpec(num_bits=4, axis=0)})
        {'weight': tensor([[ 0.5443, -1.2700]]), 'bias': tensor([0.5000])}
    """
    steps = _scales_for("fake_quant_params", params, specs, scales)
    return {
        n: fake_quantize(p, steps[n], spec=specs[n]) if n in specs else p for n, p in params.items()
    }


def quantize_params(
    params: Params,
    specs: Mapping[str, QuantSpec],
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor | QTensor]:
    """Returns params with each name in specs as a QTensor; arguments as in `fake_quant_params`."""
    steps = _scales_for("quantize_params", params, specs, scales)
    return {n: quantize(p, steps[n], spec=specs[n]) if n in specs else p for n, p in params.items()}


def dequantize_params(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns params with each QTensor as a float tensor again.

    `dequantize_params(quantize_params(p, ...))` equals `fake_quant_params(p, ...)` bit for bit.
    """
    return {n: dequantize(p) if isinstance(p, QTensor) else p for n, p in params.items()}


def _scales_for(
    function: str,
    params: Params,
    specs: Mapping[str, QuantSpec],
    scales: Mapping[str, Tensor] | None,
) -> Mapping[str, Tensor]:
    _require_names(function, "specs", specs, params)
    if scales is None:
        return param_scales(params, specs)
    _require_names(function, "scales", specs, scales)
    return scales


def _require_names(
    function: str, argument: str, wanted: Mapping[str, Any], available: Mapping[str, Any]
) -> None:
    if not isinstance(wanted, Mapping):
        raise TypeError(
            f"{function}: specs must be a dict of QuantSpecs by name, from assign_specs(params, rules), "
            f"got {type(wanted).__name__}."
        )
    missing = [name for name in wanted if name not in available]
    if missing and argument == "specs":
        raise ValueError(f"{function}: specs must name parameters of params, got {missing}.")
    if missing:
        raise ValueError(f"{function}: {argument} must have every name in specs, lacks {missing}.")
