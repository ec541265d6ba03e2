"""No public function writes its inputs, the RNG, or any of torch's global settings."""

import pytest
import torch
from torch.utils import _pytree as pytree

import fquant as fq
from fquant import sparse

SPEC = fq.QuantSpec(narrow_range=True, axis=0)
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 4, generator=GENERATOR)
CELLS = sparse.SparseTensor.from_dense(torch.rand(1, 2, 5, 5, generator=GENERATOR).round())
WEIGHT = torch.randn(3, 3, 3, 2, generator=GENERATOR)
MAP = sparse.subm_map(CELLS, 3)
PARAMS = {"w": WEIGHT, "b": torch.zeros(3)}
SPECS = {"w": SPEC}
OBSERVER = fq.MaxObserver()
AVERAGE = fq.MovingAverageObserver()
STATE, OTHER = (OBSERVER.update(OBSERVER.init(), x) for x in (X, X * 2))
PAST = AVERAGE.update(AVERAGE.init(), X)
Q = fq.quantize(X, 0.1)
Q_CELLS, Q_WEIGHT = fq.quantize(CELLS, 0.1), fq.quantize_params(PARAMS, SPECS)["w"]
STEP = torch.tensor(0.1)
STOCHASTIC = fq.QuantSpec(rounding="stochastic")
NOISE = torch.rand(X.shape, generator=GENERATOR)
MIN_MAX, FIXED = fq.MinMaxObserver(0), fq.FixedWidthHistogramObserver()
HISTOGRAM = fq.HistogramObserver(0, 256)
SEEN = HISTOGRAM.update(HISTOGRAM.init(), X / 8)

MODEL = torch.nn.Sequential(
    torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU(), torch.nn.Linear(3, 2)
)
TENSORS = {n: p.detach() for n, p in (*MODEL.named_parameters(), *MODEL.named_buffers())}
SHARED = fq.Quantizer(per="channel")
PLAN = fq.make_plan(MODEL, [fq.OpRule(weight=SHARED, inputs=SHARED)], (X,))
STATS = fq.calibrate_model(MODEL, PLAN, TENSORS, [X], progress=False)
TRAINED = fq.fake_quant(MODEL, PLAN, train=True, with_buffers=True)

CALLS = {
    "tensor_quant": lambda x: fq.tensor_quant(x, 2.0),
    "fake_tensor_quant": lambda x: fq.fake_tensor_quant(x, 2.0),
    "fake_affine_tensor_quant": lambda x: fq.fake_affine_tensor_quant(x, -1.0, 2.0),
    "compute_amax": lambda x: fq.compute_amax(x, 0),
    "compute_scale": lambda x: fq.compute_scale(x.abs()),
    "compute_scale_zero_point": lambda x: fq.compute_scale_zero_point(x, x + 1),
    "quantize": lambda x: fq.quantize(x, 0.1),
    "fake_quantize": lambda x: fq.fake_quantize(x, 0.1, 3),
    "straight_through": lambda x: fq.straight_through(x.round(), x),
    "scaled_e4m3": lambda x: fq.scaled_e4m3(x, 2.0),
    "fake_quantize_e4m3": lambda x: fq.fake_quantize(x, 0.1, spec=fq.E4M3),
    "fake_quantize_nf4": lambda x: fq.fake_quantize(x, 0.1, spec=fq.NF4),
    "fake_quantize_both": lambda x: fq.fake_quantize_both(x, 0.1),
    "fake_quantize_lsq": lambda x: fq.fake_quantize_lsq(x, 0.1, 0.2),
    "fake_quantize_pact": lambda x: fq.fake_quantize_pact(x, 2.0),
    "learned_clip": lambda x: fq.learned_clip(x, -1.0, 1.0),
    "lsq_scale": fq.lsq_scale,
    "lsq_plus_scale": fq.lsq_plus_scale,
    "round_to_integer": lambda x: fq.round_to_integer(x, "half_away"),
    "two_level_scales": lambda x: fq.two_level_scales(x.abs()),
    "stochastic": lambda x: fq.fake_quantize(x, 0.1, spec=STOCHASTIC, noise=NOISE),
    "MinMaxObserver": lambda x: MIN_MAX.update(MIN_MAX.init(), x),
    "HistogramObserver": lambda x: HISTOGRAM.update(SEEN, x),
    "FixedWidthHistogramObserver": lambda x: FIXED.update(FIXED.update(FIXED.init(), X), x),
    "MaxObserver": lambda x: OBSERVER.update(STATE, x),
    "MovingAverageObserver": lambda x: AVERAGE.update(PAST, x),
}
TREE_CALLS = {
    "finalize": (lambda s: fq.finalize(PLAN, s), STATS),
    "refreshed": (lambda q: fq.refreshed(PLAN, q, STATS), fq.finalize(PLAN, STATS)),
    "equalize": (lambda t: fq.equalize(PLAN, *t), (TENSORS, fq.finalize(PLAN, STATS))),
    "equalize_layers": (lambda p: fq.equalize_layers(MODEL, p, {"0 1": "3"}), TENSORS),
    "fold_batch_norm": (lambda p: fq.fold_batch_norm(MODEL, p, {"0": "1"}), TENSORS),
    "fake_quant": (lambda t: TRAINED(*t, X), (TENSORS, fq.finalize(PLAN, STATS))),
    "estimate_batch_norm": (
        lambda t: fq.estimate_batch_norm(MODEL, lambda p, x: TRAINED(p, t[1], x), t[0], [X]),
        (TENSORS, fq.finalize(PLAN, STATS)),
    ),
    "pack": (lambda q: fq.unpack(fq.pack(q)), fq.quantize(X, 0.1, spec=fq.QuantSpec(4))),
    "HistogramObserver.merge": (lambda s: HISTOGRAM.merge(s, s), SEEN),
    "read-outs": (
        lambda s: [
            function(HISTOGRAM.histogram(s))
            for function in (
                fq.percentile_amax,
                fq.entropy_amax,
                fq.mse_amax,
                fq.sqnr_amax,
                fq.octav_amax,
                fq.aciq_amax,
            )
        ],
        SEEN,
    ),
    "dequantize": (fq.dequantize, Q),
    "split_floating": (
        lambda tree: fq.split_floating(tree)[1]([t * 2 for t in fq.split_floating(tree)[0]]),
        Q,
    ),
    "param_scales": (lambda p: fq.param_scales(p, SPECS), PARAMS),
    "fake_quant_params": (lambda p: fq.fake_quant_params(p, SPECS), PARAMS),
    "quantize_params": (lambda p: fq.quantize_params(p, SPECS), PARAMS),
    "dequantize_params": (fq.dequantize_params, {"w": Q_WEIGHT}),
    "merge": (lambda s: OBSERVER.merge(*s), (STATE, OTHER)),
    "merge_stats": (
        lambda s: fq.merge_stats({"s": s[0]}, {"s": s[1]}, {"s": OBSERVER}),
        (STATE, OTHER),
    ),
    "calibrate": (
        lambda s: fq.calibrate(lambda x: {"s": x}, [X], {"s": OBSERVER}, {"s": s}, progress=False),
        STATE,
    ),
    "observed_amax": (lambda s: fq.observed_amax({"s": s}, {"s": OBSERVER}), STATE),
    "to_dense": (lambda c: c.to_dense(), CELLS),
    "subm_map": (lambda c: sparse.subm_map(c, 3), CELLS),
    "conv_map": (lambda c: sparse.conv_map(c, 2, 2), CELLS),
    "transpose_map": (sparse.transpose_map, MAP),
    "subm_conv": (lambda t: sparse.subm_conv(t[0], t[1]["w"], t[1]["b"]), (CELLS, PARAMS)),
    "sparse_conv": (lambda t: sparse.sparse_conv(t[0], t[1]["w"], t[1]["b"]), (CELLS, PARAMS)),
    "transposed_conv_map": (lambda c: sparse.transposed_conv_map(c, 2, 2), CELLS),
    "max_pool": (lambda c: sparse.max_pool(c, 2), CELLS),
    "avg_pool": (lambda c: sparse.avg_pool(c, 2), CELLS),
    "global_avg_pool": (sparse.global_avg_pool, CELLS),
    "global_max_pool": (sparse.global_max_pool, CELLS),
    "from_points": (lambda p: sparse.from_points(p, p, 1.0, [-3.0] * 4, [3.0] * 4), X),
    "sparse_conv_int8": (
        lambda t: sparse.sparse_conv_int8(
            t[0], t[1], t[2], kernel_map=t[3], output_scale=t[4], relu=True
        ),
        (Q_CELLS, Q_WEIGHT, PARAMS["b"], MAP, STEP),
    ),
}


def global_state():
    return (
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.overrides._get_current_function_mode_stack(),
    )


def assert_pure(function, tree):
    leaves = pytree.tree_leaves(tree)
    before = [leaf.clone() for leaf in leaves]
    versions = [leaf._version for leaf in leaves]
    structure, state = pytree.tree_structure(tree), global_state()
    first, second = function(tree), function(tree)
    for a, b in zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True):
        assert torch.equal(a, b)
    assert pytree.tree_structure(tree) == structure
    assert [leaf._version for leaf in leaves] == versions
    assert all(torch.equal(a, b) for a, b in zip(pytree.tree_leaves(tree), before, strict=True))
    assert global_state() == state


@pytest.mark.parametrize("function", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensor_functions_are_pure(function, requires_grad):
    assert_pure(function, X.clone().requires_grad_(requires_grad))


@pytest.mark.parametrize(("function", "tree"), TREE_CALLS.values(), ids=TREE_CALLS.keys())
def test_tree_functions_are_pure(function, tree):
    assert_pure(function, tree)


def test_the_check_fails_on_impure_functions():
    with pytest.raises(AssertionError):
        assert_pure(lambda x: x.mul_(1.0), X.clone())
    with pytest.raises(AssertionError):
        assert_pure(lambda x: x + torch.rand(()), X.clone())
