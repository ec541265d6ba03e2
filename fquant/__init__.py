"""Quantization as pure functions over trees of tensors, composed with `torch.func`.

    amax   = compute_amax(x, axis)               how large
    scale  = compute_scale(amax, spec)           the step
    q      = quantize(x, scale, spec=spec)       integers, as a record
    y      = fake_quantize(x, scale, spec=spec)  the same values as floats, differentiable

`fquant.sparse` has sparse tensors and their convolutions, `fquant.graph` what is deployed.
"""

from fquant import graph, sparse
from fquant.affine import dequantize, fake_quantize, quantize
from fquant.amax_quant import (
    fake_affine_tensor_quant,
    fake_tensor_quant,
    scaled_e4m3,
    tensor_quant,
)
from fquant.batch_norm import estimate_batch_norm, fold_batch_norm, folded_conv_batch_norm
from fquant.calibration import calibrate, merge_stats, observed_amax
from fquant.codebook import NF4, Codebook
from fquant.distributed import merge_stats_over_ranks
from fquant.equalization import equalize, equalize_layers
from fquant.formats import FloatFormat, Format
from fquant.gradient_formats import fake_quantize_both, fake_quantize_gradient
from fquant.graph import export_qdq, lower, prepack, to_onnx
from fquant.interception.ops import DEFAULT_OPS, Ops, register_op, replace_forward
from fquant.interception.stack import quantizable, site
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
from fquant.op_rules import OpRule, Quantizer, fp8, skip, w4, w4a8, w8, w8a8
from fquant.packing import PackedTensor, pack, unpack
from fquant.params import dequantize_params, fake_quant_params, param_scales, quantize_params
from fquant.plan import Operand, Plan, Site, skip_first_and_last
from fquant.planning import make_plan
from fquant.presets import (
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
)
from fquant.pytree import split_floating
from fquant.qat import FineTuning, fine_tuning, fine_tuning_with_divisors, refreshed
from fquant.qstate import finalize, qstate_names, split_qstate
from fquant.recipes import (
    load_recipe,
    plan_from_dict,
    plan_to_dict,
    rules_from_dicts,
    rules_to_dicts,
    save_recipe,
)
from fquant.records import QTensor
from fquant.rounding import round_to_integer
from fquant.rules import Rule, UnusedRuleWarning, assign_specs
from fquant.scales import (
    compute_amax,
    compute_scale,
    compute_scale_zero_point,
    two_level_scales,
)
from fquant.search import search_scales
from fquant.serialization import load, save
from fquant.spec import QuantSpec
from fquant.stateful import FakeQuantized
from fquant.straight_through import straight_through
from fquant.transforms import calibrate_model, fake_quant, init_stats, observe

__all__ = [
    "BF16",
    "Codebook",
    "DEFAULT_OPS",
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E4M3FNUZ",
    "E5M2",
    "E5M2FNUZ",
    "FP16",
    "FakeQuantized",
    "FineTuning",
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
    "OpRule",
    "Operand",
    "Ops",
    "PackedTensor",
    "Plan",
    "QPYTORCH_E4M3",
    "QPYTORCH_E5M2",
    "QPYTORCH_FP16",
    "QTensor",
    "QuantSpec",
    "Quantizer",
    "Rule",
    "Site",
    "UnusedRuleWarning",
    "aciq_amax",
    "aciq_multiplier",
    "assign_specs",
    "calibrate",
    "calibrate_model",
    "compute_amax",
    "compute_scale",
    "compute_scale_zero_point",
    "dequantize",
    "dequantize_params",
    "entropy_amax",
    "equalize",
    "equalize_layers",
    "estimate_batch_norm",
    "export_qdq",
    "fake_affine_tensor_quant",
    "fake_quant",
    "fake_quant_params",
    "fake_quantize",
    "fake_quantize_both",
    "fake_quantize_gradient",
    "fake_quantize_lsq",
    "fake_quantize_pact",
    "fake_tensor_quant",
    "finalize",
    "fine_tuning",
    "fine_tuning_with_divisors",
    "fold_batch_norm",
    "folded_conv_batch_norm",
    "fp8",
    "gaussian_std_from_range",
    "graph",
    "init_stats",
    "learned_clip",
    "load",
    "load_recipe",
    "lower",
    "lsq_plus_scale",
    "lsq_scale",
    "make_plan",
    "merge_stats",
    "merge_stats_over_ranks",
    "mse_amax",
    "observe",
    "observed_amax",
    "octav_amax",
    "pack",
    "param_scales",
    "percentile_amax",
    "plan_from_dict",
    "plan_to_dict",
    "prepack",
    "qstate_names",
    "quantizable",
    "quantize",
    "quantize_params",
    "refreshed",
    "register_op",
    "replace_forward",
    "round_to_integer",
    "rules_from_dicts",
    "rules_to_dicts",
    "save",
    "save_recipe",
    "scaled_e4m3",
    "search_scales",
    "site",
    "skip",
    "skip_first_and_last",
    "sparse",
    "split_floating",
    "split_qstate",
    "sqnr_amax",
    "straight_through",
    "tensor_quant",
    "to_onnx",
    "two_level_scales",
    "unpack",
    "w4",
    "w4a8",
    "w8",
    "w8a8",
]
