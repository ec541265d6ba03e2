"""Quantization as pure functions over trees of tensors, composed with `torch.func`.

    amax   = compute_amax(x, axis)               how large
    scale  = compute_scale(amax, spec)           the step
    q      = quantize(x, scale, spec=spec)       integers, as a record
    y      = fake_quantize(x, scale, spec=spec)  the same values as floats, differentiable

`fquant.sparse` has sparse tensors and their convolutions.
"""

from fquant import sparse
from fquant.affine import (
    compute_amax,
    compute_scale,
    compute_scale_zero_point,
    dequantize,
    fake_quantize,
    quantize,
)
from fquant.amax_quant import fake_affine_tensor_quant, fake_tensor_quant, tensor_quant
from fquant.calibration import calibrate, merge_stats, observed_amax
from fquant.observers import MaxObserver, MovingAverageObserver, Observer
from fquant.params import dequantize_params, fake_quant_params, param_scales, quantize_params
from fquant.pytree import split_floating
from fquant.records import QTensor
from fquant.rules import Rule, UnusedRuleWarning, assign_specs
from fquant.spec import QuantSpec
from fquant.straight_through import straight_through

__all__ = [
    "MaxObserver",
    "MovingAverageObserver",
    "Observer",
    "QTensor",
    "QuantSpec",
    "Rule",
    "UnusedRuleWarning",
    "assign_specs",
    "calibrate",
    "compute_amax",
    "compute_scale",
    "compute_scale_zero_point",
    "dequantize",
    "dequantize_params",
    "fake_affine_tensor_quant",
    "fake_quant_params",
    "fake_quantize",
    "fake_tensor_quant",
    "merge_stats",
    "observed_amax",
    "param_scales",
    "quantize",
    "quantize_params",
    "sparse",
    "split_floating",
    "straight_through",
    "tensor_quant",
]
