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
from fquant.interception.ops import DEFAULT_OPS, Ops, register_op, replace_forward
from fquant.interception.stack import quantizable, site
from fquant.observers import MaxObserver, MovingAverageObserver, Observer
from fquant.op_rules import OpRule, Quantizer, skip, w4, w4a8, w8, w8a8
from fquant.params import dequantize_params, fake_quant_params, param_scales, quantize_params
from fquant.plan import Operand, Plan, Site
from fquant.planning import make_plan
from fquant.pytree import split_floating
from fquant.qat import (
    FineTuning,
    fine_tuning,
    fine_tuning_with_divisors,
    fold_batch_norm,
    refreshed,
)
from fquant.recipes import plan_from_dict, plan_to_dict, rules_from_dicts, rules_to_dicts
from fquant.records import QTensor
from fquant.rules import Rule, UnusedRuleWarning, assign_specs
from fquant.search import search_scales
from fquant.spec import QuantSpec
from fquant.straight_through import straight_through
from fquant.transforms import (
    calibrate_model,
    fake_quant,
    finalize,
    init_stats,
    observe,
    split_qstate,
)

__all__ = [
    "DEFAULT_OPS",
    "FineTuning",
    "MaxObserver",
    "MovingAverageObserver",
    "Observer",
    "OpRule",
    "Operand",
    "Ops",
    "Plan",
    "QTensor",
    "QuantSpec",
    "Quantizer",
    "Rule",
    "Site",
    "UnusedRuleWarning",
    "assign_specs",
    "calibrate",
    "calibrate_model",
    "compute_amax",
    "compute_scale",
    "compute_scale_zero_point",
    "dequantize",
    "dequantize_params",
    "fake_affine_tensor_quant",
    "fake_quant",
    "fake_quant_params",
    "fake_quantize",
    "fake_tensor_quant",
    "finalize",
    "fine_tuning",
    "fine_tuning_with_divisors",
    "fold_batch_norm",
    "init_stats",
    "make_plan",
    "merge_stats",
    "observe",
    "observed_amax",
    "param_scales",
    "plan_from_dict",
    "plan_to_dict",
    "quantizable",
    "quantize",
    "quantize_params",
    "refreshed",
    "register_op",
    "replace_forward",
    "rules_from_dicts",
    "rules_to_dicts",
    "search_scales",
    "site",
    "skip",
    "sparse",
    "split_floating",
    "split_qstate",
    "straight_through",
    "tensor_quant",
    "w4",
    "w4a8",
    "w8",
    "w8a8",
]
