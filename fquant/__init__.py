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
from fquant.amax_quant import (
    fake_affine_tensor_quant,
    fake_tensor_quant,
    scaled_e4m3,
    tensor_quant,
)
from fquant.calibration import calibrate, merge_stats, observed_amax
from fquant.codebook import NF4, Codebook
from fquant.formats import (
    BF16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    FP16,
    NVFP4,
    QPYTORCH_E4M3,
    QPYTORCH_E5M2,
    QPYTORCH_FP16,
    FloatFormat,
    Format,
)
from fquant.gradient_formats import fake_quantize_both, fake_quantize_gradient
from fquant.learned import (
    fake_quantize_lsq,
    fake_quantize_pact,
    learned_clip,
    lsq_plus_scale,
    lsq_scale,
)
from fquant.observers import (
    FixedWidthHistogramObserver,
    Histogram,
    HistogramObserver,
    MaxObserver,
    MinMaxObserver,
    MovingAverageObserver,
    NonFiniteWarning,
    Observer,
    aciq_amax,
    aciq_multiplier,
    entropy_amax,
    gaussian_std_from_range,
    mse_amax,
    octav_amax,
    percentile_amax,
    sqnr_amax,
)
from fquant.packing import PackedTensor, pack, unpack
from fquant.params import dequantize_params, fake_quant_params, param_scales, quantize_params
from fquant.pytree import split_floating
from fquant.records import QTensor
from fquant.rounding import round_to_integer
from fquant.rules import Rule, UnusedRuleWarning, assign_specs
from fquant.scale_rules import two_level_scales
from fquant.spec import QuantSpec
from fquant.straight_through import straight_through

__all__ = [
    "BF16",
    "Codebook",
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E4M3FNUZ",
    "E5M2",
    "E5M2FNUZ",
    "FP16",
    "FixedWidthHistogramObserver",
    "FloatFormat",
    "Format",
    "Histogram",
    "HistogramObserver",
    "MaxObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "NF4",
    "NVFP4",
    "NonFiniteWarning",
    "Observer",
    "PackedTensor",
    "QPYTORCH_E4M3",
    "QPYTORCH_E5M2",
    "QPYTORCH_FP16",
    "QTensor",
    "QuantSpec",
    "Rule",
    "UnusedRuleWarning",
    "aciq_amax",
    "aciq_multiplier",
    "assign_specs",
    "calibrate",
    "compute_amax",
    "compute_scale",
    "compute_scale_zero_point",
    "dequantize",
    "dequantize_params",
    "entropy_amax",
    "fake_affine_tensor_quant",
    "fake_quant_params",
    "fake_quantize",
    "fake_quantize_both",
    "fake_quantize_gradient",
    "fake_quantize_lsq",
    "fake_quantize_pact",
    "fake_tensor_quant",
    "gaussian_std_from_range",
    "learned_clip",
    "lsq_plus_scale",
    "lsq_scale",
    "merge_stats",
    "mse_amax",
    "observed_amax",
    "octav_amax",
    "pack",
    "param_scales",
    "percentile_amax",
    "quantize",
    "quantize_params",
    "round_to_integer",
    "scaled_e4m3",
    "sparse",
    "split_floating",
    "sqnr_amax",
    "straight_through",
    "tensor_quant",
    "two_level_scales",
    "unpack",
]
