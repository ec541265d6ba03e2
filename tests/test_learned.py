"""Learned ranges against the papers' formulas and finite differences; formats of gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fquant as fq
from fquant.testing import strategies

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 8, generator=GENERATOR, dtype=torch.float64) * 3
WEIGHTS = torch.randn(6, 8, generator=GENERATOR, dtype=torch.float64)
SPECS = [fq.QuantSpec(3), fq.QuantSpec(4, unsigned=True), fq.QuantSpec(2, narrow_range=True)]


@given(strategies.quant_cases())
def test_lsq_has_the_values_of_fake_quantize(case):
    lsq = fq.fake_quantize_lsq(case.x, case.scale, spec=case.spec)
    assert torch.equal(lsq, fq.fake_quantize(case.x, case.scale, spec=case.spec))


def test_lsq_ends_of_the_range_are_inside():
    def fake(x, scale):
        return fq.fake_quantize_lsq(x, scale, gradient_scale=1.0)

    for x in (63.5, -64.0):  # 127 and -128 steps
        gradient = torch.func.grad(fake, (0, 1))(torch.tensor(x), torch.tensor(0.5))
        assert [g.item() for g in gradient] == [1, 0]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("axis", [None, 0])
def test_lsq_gradients_are_equation_2_and_3(spec, axis):
    scale = fq.compute_amax(X, axis) * 0.3 / spec.q_max

    def loss(x, scale, factor):
        y = fq.fake_quantize_lsq(x, scale, spec=spec, gradient_scale=factor)
        return (y * WEIGHTS).sum()

    by_x, by_scale = torch.func.grad(loss, (0, 1))(X, scale, None)
    v = X / scale
    inside = (v >= spec.q_min) & (v <= spec.q_max)
    slope = torch.where(inside, v.round() - v, v.clamp(spec.q_min, spec.q_max).round())
    assert torch.equal(by_x, WEIGHTS * inside)
    total = (WEIGHTS * slope).sum() if axis is None else (WEIGHTS * slope).sum(1, keepdim=True)
    count = X.numel() if axis is None else X.shape[1]
    torch.testing.assert_close(by_scale, total / math.sqrt(count * spec.q_max))
    torch.testing.assert_close(torch.func.grad(loss, 1)(X, scale, 1.0), total)


def test_lsq_plus_offset():
    spec, scale, offset = fq.QuantSpec(3), torch.tensor(0.5).double(), torch.tensor(0.7).double()

    def loss(offset, scale):
        y = fq.fake_quantize_lsq(X, scale, offset, spec, gradient_scale=1.0)
        return (y * WEIGHTS).sum()

    v = (X - offset) / scale
    y = fq.fake_quantize_lsq(X, scale, offset, spec)
    assert torch.equal(y, v.round().clamp(-4, 3) * scale + offset)
    outside = (v < -4) | (v > 3)
    by_offset, by_scale = torch.func.grad(loss, (0, 1))(offset, scale)
    torch.testing.assert_close(by_offset, (WEIGHTS * outside).sum())
    slope = torch.where(outside, v.clamp(-4, 3).round(), v.round() - v)
    torch.testing.assert_close(by_scale, (WEIGHTS * slope).sum())


def test_training_lsq_lands_near_the_scale_of_least_error():
    spec = fq.QuantSpec(3, narrow_range=True)
    x = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    scale = fq.lsq_scale(x, spec)

    def error(scale):
        return ((fq.fake_quantize_lsq(x, scale, spec=spec, gradient_scale=1.0) - x) ** 2).mean()

    for _ in range(400):
        scale = scale - 0.3 * torch.func.grad(error)(scale)
    # Near quantization.md 5.4: LSQ's slope inside is round(v) - v, where the error's own is round(v).
    assert (scale * spec.q_max).item() == pytest.approx(1.9523, abs=0.04)


def test_initial_scales():
    x = torch.tensor([1.0, -3.0])
    assert fq.lsq_scale(x, fq.QuantSpec(4)).item() == pytest.approx(2 * 2 / math.sqrt(7))
    assert fq.lsq_scale(x, fq.QuantSpec(4, unsigned=True)).item() == pytest.approx(
        4 / math.sqrt(15)
    )
    assert fq.lsq_plus_scale(x, fq.QuantSpec(4)).item() == pytest.approx((1 + 3 * 2) / 8)
    for function in (fq.lsq_scale, fq.lsq_plus_scale):
        assert function(torch.zeros(3)).item() == function(torch.zeros(0)).item() == 1


def test_clip_gradients_of_pytorch_quantization():
    x = torch.tensor([-2.0, -1.0, 0.0, 2.0, 5.0])
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])

    def loss(x, low, high):
        return (fq.learned_clip(x, low, high) * weights).sum()

    by_x, by_low, by_high = torch.func.grad(loss, (0, 1, 2))(
        x, torch.tensor(-1.0), torch.tensor(2.0)
    )
    assert by_x.tolist() == [0, 0, 100, 0, 0]
    assert (by_low.item(), by_high.item()) == (11, 11000)
    high = torch.tensor([[2.0], [3.0]])
    rows = torch.func.grad(lambda h: fq.learned_clip(x.expand(2, 5), 0.0, h).sum())(high)
    assert rows.tolist() == [[2], [1]]


@given(strategies.float_tensors(limit=10.0), st.integers(2, 8))
def test_pact_values(x, bits):
    alpha = 3.7
    fake = fq.fake_quantize_pact(x, alpha, bits)
    spec = fq.QuantSpec(bits, unsigned=True)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = torch.tensor(alpha, dtype=dtype) / spec.q_max
    assert torch.equal(fake, fq.fake_quantize(x, scale, spec=spec))


def test_pact_gradient_by_finite_differences():
    alpha = torch.tensor(2.0, dtype=torch.float64)

    def smooth(alpha):  # what a straight-through derivative differentiates
        return (X.clamp(min=0).minimum(alpha) * WEIGHTS).sum()

    gradient = torch.func.grad(lambda a: (fq.fake_quantize_pact(X, a, 4) * WEIGHTS).sum())(alpha)
    step = 1e-6
    difference = (smooth(alpha + step) - smooth(alpha - step)) / (2 * step)
    assert gradient.item() == pytest.approx(difference.item(), rel=1e-6)


def test_gradient_is_rounded_then_masked():
    x = torch.tensor([0.3, 500.0, -1.0])
    weights = torch.tensor([1.1, 2.3, 7e5])
    spec = fq.E5M2
    compiled_grad = torch.compile(
        torch.func.grad(
            lambda x: (fq.fake_quantize_both(x, 1.0, gradient_scale=1.0) * weights).sum()
        ),
        backend="aot_eager",
        fullgraph=True,
    )
    torch._dynamo.reset()
    expected = weights.to(torch.float8_e5m2).float() * torch.tensor([1.0, 0.0, 1.0])
    expected[2] = 57344  # saturates, where torch's cast overflows
    assert torch.equal(compiled_grad(x), expected)
    scaled = torch.func.grad(lambda x: (fq.fake_quantize_gradient(x) * weights).sum())(x)
    scale = fq.compute_scale(torch.tensor(7e5), spec)
    assert torch.equal(scaled, fq.fake_quantize(weights, scale, spec=spec))


def test_gradient_scale_is_per_sample_under_vmap():
    weights = torch.tensor([[1.1, 2.3], [1e6, 3.3e6]])
    gradient = torch.func.vmap(
        torch.func.grad(lambda x, w: (fq.fake_quantize_gradient(x) * w).sum()), (0, 0)
    )(torch.ones(2, 2), weights)
    scale = fq.compute_scale(weights.amax(1, keepdim=True), fq.E5M2)
    assert torch.equal(gradient, fq.fake_quantize(weights, scale, spec=fq.E5M2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fq.fake_quantize_lsq(X.int(), 1.0), TypeError, "fake_quantize_lsq: x must be"),
        (lambda: fq.fake_quantize_lsq(X, torch.ones(5)), ValueError, "scale must have a shape"),
        (
            lambda: fq.fake_quantize_lsq(X, 1.0, spec=fq.QuantSpec(rounding="floor")),
            ValueError,
            "spec must round half to even, got 'floor'",
        ),
        (
            lambda: fq.learned_clip(X, 0.0, torch.ones(5)),
            ValueError,
            "learned_clip: high must have",
        ),
        (lambda: fq.fake_quantize_pact(X, 1.0, 1), ValueError, "num_bits must be"),
        (
            lambda: fq.fake_quantize_gradient(X, fq.QuantSpec(rounding="stochastic")),
            ValueError,
            "must not round stochastically",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
