"""quantize, dequantize, fake_quantize and the computation of scales: properties and goldens."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import fquant as fq
from fquant.testing import strategies


@given(strategies.quant_cases())
def test_fake_is_dequantize_of_quantize_bit_for_bit(case):
    record = fq.quantize(case.x, case.scale, spec=case.spec)
    fake = fq.fake_quantize(case.x, case.scale, spec=case.spec)
    assert fake.dtype == case.x.dtype
    assert record.q.dtype == case.spec.dtype
    assert torch.equal(fake, fq.dequantize(record))


@given(strategies.quant_cases(), st.data())
def test_fake_is_dequantize_of_quantize_with_a_zero_point(case, data):
    zero_point = data.draw(st.integers(case.spec.q_min, case.spec.q_max))
    record = fq.quantize(case.x, case.scale, zero_point, case.spec)
    fake = fq.fake_quantize(case.x, case.scale, zero_point, case.spec)
    assert torch.equal(fake, fq.dequantize(record))


@given(strategies.quant_cases(dtypes=(torch.float32, torch.float64)))
def test_idempotent(case):
    once = fq.fake_quantize(case.x, case.scale, spec=case.spec)
    assert torch.equal(fq.fake_quantize(once, case.scale, spec=case.spec), once)


@given(strategies.quant_cases(dtypes=(torch.float32, torch.float64)))
def test_error_is_at_most_half_a_step(case):
    fake = fq.fake_quantize(case.x, case.scale, spec=case.spec)
    # Rounding of x / scale, of q * scale and of scale itself: 3 relative errors of eps on q_max steps.
    slack = 3 * torch.finfo(case.x.dtype).eps * case.spec.q_max
    # A group whose step was denormal has scale 1 and holds only values that round to 0.
    assert bool(((fake - case.x).abs() <= case.scale * (0.5 + slack)).all())


@given(strategies.quant_cases(symmetric_grids_only=True))
def test_odd_symmetry_in_narrow_range(case):
    fake = fq.fake_quantize(case.x, case.scale, spec=case.spec)
    assert torch.equal(fq.fake_quantize(-case.x, case.scale, spec=case.spec), -fake)


@given(
    strategies.float_tensors(st.tuples(st.integers(2, 20)), limit=300.0),
    strategies.specs(),
    st.floats(0.01, 10.0),
)
def test_monotone(x, spec, scale):
    ordered = x.sort().values
    assert bool((fq.fake_quantize(ordered, scale, spec=spec).diff() >= 0).all())


@given(strategies.quant_cases())
def test_gradient_is_the_clip_mask(case):
    assume(case.x.numel() > 0)
    x = case.x
    gradient = torch.func.grad(
        lambda x: fq.fake_quantize(x, case.scale, spec=case.spec).float().sum()
    )(x)
    wide, scale = x.to(case.scale.dtype), case.scale
    inside = (wide >= case.spec.q_min * scale) & (wide <= case.spec.q_max * scale)
    assert torch.equal(gradient, inside.to(x.dtype))


@given(strategies.quant_cases())
def test_quantization_commutes_with_permutation(case):
    assume(case.x.ndim > 0)
    order = torch.randperm(case.x.shape[0], generator=torch.Generator().manual_seed(0))
    scale = case.scale
    if scale.ndim == case.x.ndim and scale.shape[0] == case.x.shape[0]:
        scale = scale[order]
    permuted = fq.fake_quantize(case.x[order], scale, spec=case.spec)
    assert torch.equal(permuted, fq.fake_quantize(case.x, case.scale, spec=case.spec)[order])


@given(strategies.quant_cases())
def test_pure(case):
    x, scale = case.x.clone(), case.scale.clone()
    versions = case.x._version, case.scale._version
    generator = torch.get_rng_state()
    grad_enabled, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    fq.fake_quantize(case.x, case.scale, spec=case.spec)
    fq.dequantize(fq.quantize(case.x, case.scale, spec=case.spec))
    fq.fake_tensor_quant(case.x, fq.compute_amax(case.x))
    fq.tensor_quant(case.x, fq.compute_amax(case.x))
    assert torch.equal(case.x, x)
    assert torch.equal(case.scale, scale)
    assert (case.x._version, case.scale._version) == versions
    assert torch.equal(torch.get_rng_state(), generator)
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == (grad_enabled, dtype)


@given(strategies.float_tensors(), strategies.specs())
def test_asymmetric_range_is_covered_and_holds_zero(x, spec):
    assume(x.numel() > 0)
    scale, zero_point = fq.compute_scale_zero_point(x.min(), x.max(), spec)
    assert fq.fake_quantize(torch.zeros(1, dtype=x.dtype), scale, zero_point, spec).item() == 0
    fake = fq.fake_quantize(x, scale, zero_point, spec)
    # Half a step, and another half where rounding the zero point moved the grid's end.
    eps = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
    slack = x.abs().max().double() * 2 * eps
    assert bool(((fake.double() - x.double()).abs() <= scale.double() * 1.001 + slack).all())


def test_amax_of_each_group():
    x = torch.tensor([[[1.0, -2.0], [3.0, 0.5]], [[-7.0, 1.0], [2.0, 2.0]]])
    assert fq.compute_amax(x).item() == 7
    assert fq.compute_amax(x, axis=0).flatten().tolist() == [3, 7]
    assert fq.compute_amax(x, axis=-1).flatten().tolist() == [7, 2]
    assert fq.compute_amax(x, axis=(0, 2)).shape == (2, 1, 2)
    assert torch.equal(fq.compute_amax(x, axis=(0, 1, 2)), x.abs())
    assert fq.compute_amax(torch.zeros(0, 3), axis=1).tolist() == [[0, 0, 0]]
    assert fq.compute_amax(torch.zeros(0)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_amax_is_that_of_magnitudes_bit_for_bit(dtype):
    """It is worked out without |x|; signs of zero, infinities and NaN are what would tell."""
    finite = torch.randn(6, 8).to(dtype)
    finite[0], finite[1], finite[2, 0] = -0.0, 0.0, -torch.inf
    finite[3], finite[4] = finite[3].abs(), -finite[4].abs()
    for x in (finite, torch.where(finite == finite[5, 1], torch.nan, finite)):
        for axis, block, groups in ((None, None, x.reshape(1, -1)), (0, None, x)):
            amax = fq.compute_amax(x, axis, block)
            expected = groups.abs().amax(dim=1).reshape(amax.shape)
            assert amax.dtype == dtype
            assert torch.equal(amax.nan_to_num(-1.0), expected.nan_to_num(-1.0))
            assert not amax.signbit().any()
        blocks = fq.compute_amax(x, (0, 1), (1, 4))
        expected = x.abs().unflatten(1, (2, 4)).amax(2)
        assert torch.equal(blocks.nan_to_num(-1.0), expected.nan_to_num(-1.0))
        assert not blocks.signbit().any()


def test_ties_go_to_even():
    ties = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert fq.quantize(ties, 1.0).q.tolist() == [0, 2, 2, 0, -2, -2]
    assert fq.fake_quantize(ties / 4, 0.25, 3).tolist() == [0, 0.5, 0.5, 0, -0.5, -0.5]


def test_zero_amax_gives_scale_one():
    assert fq.compute_scale(torch.tensor([0.0, 1e-40, 254.0])).tolist() == [1, 1, 2]


def test_gradient_of_a_scale_with_a_zero_point():
    for x, expected in ((300.0, 127 - 5), (-300.0, -128 - 5), (0.0, 0)):
        gradient = torch.func.grad(lambda s, x=x: fq.fake_quantize(torch.tensor(x), s, 5))
        assert gradient(torch.tensor(1.0)).item() == expected


def test_amax_has_no_derivative():
    gradient = torch.func.grad(lambda x: fq.compute_amax(x, 0).sum())(torch.ones(2, 3))
    assert torch.equal(gradient, torch.zeros(2, 3))


def test_zero_point_has_no_derivative():
    x, zero_point = torch.tensor([0.3, 300.0]), torch.tensor(5.0)
    gradient = torch.func.grad(lambda z: fq.fake_quantize(x, 1.0, z).sum())(zero_point)
    assert gradient.item() == 0


def test_special_values():
    x = torch.tensor([float("nan"), float("inf"), float("-inf")])
    assert fq.quantize(x, 1.0).q.tolist() == [0, 127, -128]
    assert fq.quantize(x, 1.0, 5).q.tolist() == [5, 127, -128]
    fake = fq.fake_quantize(x, 1.0)
    assert bool(fake[0].isnan())
    assert fake[1:].tolist() == [127, -128]


@pytest.mark.parametrize(("num_bits", "unsigned"), [(8, False), (8, True), (16, False), (16, True)])
def test_integer_dtypes(num_bits, unsigned):
    spec = fq.QuantSpec(num_bits, unsigned)
    q = fq.quantize(torch.tensor([-1e9, 1e9]), 1.0, spec=spec).q
    assert q.tolist() == [spec.q_min, spec.q_max]
    assert q.element_size() * 8 == (32 if (num_bits, unsigned) == (16, True) else num_bits)


@pytest.mark.peer
@pytest.mark.parametrize("zero_point", [0, -7, 100])
def test_against_onnx_arithmetic_in_numpy(zero_point):
    x = np.concatenate([np.arange(-300, 300) / 4, np.random.default_rng(0).normal(0, 50, 5000)])
    x = x.astype(np.float32)
    scale = np.float32(0.37)
    expected = np.clip(np.rint(x / scale) + zero_point, -128, 127).astype(np.int8)
    ours = fq.quantize(torch.from_numpy(x), float(scale), zero_point).q
    assert np.array_equal(ours.numpy(), expected)


def test_inductor_equals_eager_bit_for_bit():
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    x = torch.cat([torch.arange(-600, 600) / 8, torch.randn(4000) * 30])
    arguments = [
        (x.to(dtype), torch.tensor(0.25, dtype=dtype if dtype == torch.float64 else torch.float32))
        for dtype in dtypes
    ]

    def both(x, scale):
        return fq.fake_quantize(x, scale * 1.1), fq.fake_tensor_quant(x, scale * 100)

    def every(arguments):
        return [both(*pair) for pair in arguments]

    torch._dynamo.reset()
    compiled = torch.compile(every, fullgraph=True)(arguments)  # in one graph: starting takes long
    for dtype, result, expected in zip(dtypes, compiled, every(arguments), strict=True):
        assert torch.equal(result[0], expected[0]), dtype
        assert torch.equal(result[1], expected[1]), dtype


def test_spec_is_immutable_hashable_and_copies():
    spec = fq.QuantSpec(4, axis=(0, 1))
    assert {spec: 1}[copy.deepcopy(spec)] == 1
    with pytest.raises(AttributeError):
        spec.num_bits = 8


BAD_CALLS = [
    (lambda: fq.quantize(torch.ones(2).int(), 1.0), TypeError, "quantize: x must be a floating"),
    (lambda: fq.fake_quantize(torch.ones(2), None), TypeError, "fake_quantize: scale must be"),
    (lambda: fq.fake_quantize(torch.ones(2), 0.0), ValueError, "scale must be positive, got 0.0"),
    (lambda: fq.fake_quantize(torch.ones(2), torch.ones(3)), ValueError, "scale must have a shape"),
    (lambda: fq.quantize(torch.ones(2), 1.0, 300), ValueError, "zero_point must be an integer"),
    (lambda: fq.quantize(torch.ones(2), 1.0, 0.5), ValueError, "zero_point must be an integer"),
    (lambda: fq.dequantize(torch.ones(2)), TypeError, "dequantize: x must be a QTensor"),
    (lambda: fq.compute_amax(torch.ones(2), 1), ValueError, "axis must name different axes"),
    (lambda: fq.compute_amax(torch.ones(2), (0, -1)), ValueError, "axis must name different axes"),
    (lambda: fq.compute_amax(torch.ones(2).long()), TypeError, "compute_amax: x"),
    (lambda: fq.compute_scale(torch.tensor(-1.0)), ValueError, "amax must not be negative"),
    (
        lambda: fq.compute_scale_zero_point(torch.tensor(1.0), torch.tensor(0.0)),
        ValueError,
        "minimum must not be above maximum",
    ),
    (
        lambda: fq.compute_scale_zero_point(torch.zeros(2), torch.zeros(3)),
        ValueError,
        "maximum must have the shape",
    ),
    (lambda: fq.QuantSpec(1), ValueError, "num_bits must be an integer from 2 to 16, got 1"),
    (lambda: fq.QuantSpec(8, True, True), ValueError, "narrow_range must be False"),
    (lambda: fq.QuantSpec(axis=[0]), TypeError, "axis must be"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
