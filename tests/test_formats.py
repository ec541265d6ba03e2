"""Floating-point grids and codebooks: every code, ranges, special values."""

import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fquant as fq
from fquant.testing import strategies
from tests.format_cases import PRESETS, all_values

NAN, INF = float("nan"), float("inf")


by_name = pytest.mark.parametrize("spec", PRESETS.values(), ids=PRESETS.keys())


def value_of(code, spec):
    """The value of a code by the sentence in FloatFormat's docstring, exactly."""
    field, mantissa = code >> spec.man & 2**spec.exp - 1, code & 2**spec.man - 1
    sign = -1 if code >> spec.exp + spec.man else 1
    top = field == 2**spec.exp - 1
    if spec.finite == "ieee" and top:
        return NAN if mantissa else sign * INF
    if spec.finite == "fn" and top and mantissa == 2**spec.man - 1:
        return NAN
    if spec.finite == "fnuz" and code == 2 ** (spec.exp + spec.man):
        return NAN
    if field == 0:
        power = Fraction(2) ** (1 - spec.exponent_bias)
        return float(sign * power * Fraction(mantissa if spec.subnormals else 0, 2**spec.man))
    power = Fraction(2) ** (field - spec.exponent_bias)
    return float(sign * power * (1 + Fraction(mantissa, 2**spec.man)))


@by_name
def test_every_code(spec):
    codes, values = all_values(spec)
    if isinstance(spec, fq.FloatFormat):
        expected = torch.tensor([value_of(int(c), spec) for c in codes], dtype=torch.float64)
        assert torch.equal(values.nan_to_num(7.5e9), expected.nan_to_num(7.5e9))
        grid = values[values.isfinite() & (values.abs() <= spec.q_max)]
        assert grid.max() == spec.q_max == -spec.q_min
        redundant = not spec.subnormals and spec.man > 0
    else:
        grid, redundant = values, False
    assert torch.equal(spec.snap(grid), grid)
    again = spec.encode(grid)
    assert again.dtype == spec.dtype
    assert torch.equal(spec.decode(again, torch.float64), grid)
    if not redundant and getattr(spec, "max", None) is None:
        assert torch.equal(again.long(), codes[values.isfinite()])  # -0 included
    assert torch.equal(spec.levels(), grid[grid >= 0].abs().unique())


@given(strategies.float_tensors(), st.sampled_from(sorted(PRESETS)), st.floats(0.01, 100.0))
def test_fake_is_dequantize_of_quantize_bit_for_bit(x, name, scale):
    spec = PRESETS[name]
    record = fq.quantize(x, scale, spec=spec)
    fake = fq.fake_quantize(x, scale, spec=spec)
    assert record.q.dtype == spec.dtype
    assert fake.dtype == x.dtype
    assert torch.equal(fake, fq.dequantize(record))
    assert torch.equal(
        fq.fake_quantize(x.double(), scale, spec=spec).float().isfinite(), x.isfinite()
    )


def test_special_values():
    x = torch.tensor([NAN, INF, -INF, 1e30, 0.0])
    assert fq.fake_quantize(x, 1.0, spec=fq.E4M3)[1:].tolist() == [448, -448, 448, 0]
    for spec in (fq.E4M3, fq.E5M2, fq.E4M3FNUZ, fq.BF16):
        assert bool(fq.fake_quantize(x, 1.0, spec=spec)[0].isnan())
        assert bool(fq.dequantize(fq.quantize(x, 1.0, spec=spec))[0].isnan())
    for spec in (fq.E2M1, fq.NF4):  # no code to say NaN with
        assert bool(fq.fake_quantize(x, 1.0, spec=spec)[0].isnan())
        assert fq.dequantize(fq.quantize(x, 1.0, spec=spec))[0].item() == 0
    tiny = torch.tensor([1e-40, -1e-45])
    assert fq.fake_quantize(tiny, 1.0, spec=fq.BF16).tolist() == tiny.bfloat16().float().tolist()


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        (fq.E4M3, 0x7F),
        (fq.E5M2, 0x7E),
        (fq.E5M2FNUZ, 0x80),
        (fq.FP16, 0x7E00),
        (fq.BF16, 0x7FC0),
        (fq.E2M1, 0),
    ],
)
def test_nan_has_the_code_of_ml_dtypes_and_ieee_754(spec, code):
    assert spec.encode(torch.tensor(NAN)).item() == code


# quantization.md 5.6.
@pytest.mark.parametrize(
    ("spec", "largest", "smallest_normal"),
    [
        (fq.E4M3, 448, 2**-6),
        (fq.E5M2, 57344, 2**-14),
        (fq.E3M2, 28, 2**-2),
        (fq.E2M3, 7.5, 1),
        (fq.E2M1, 6, 1),
        (fq.FP16, 65504, 2**-14),
        (fq.BF16, 2**127 * (1 + 127 / 128), 2**-126),
        (fq.QPYTORCH_E4M3, 480, 2**-6),
        (fq.QPYTORCH_E5M2, 114688, 2**-14),
        (fq.QPYTORCH_FP16, 131008, 2**-14),
    ],
)
def test_ranges_of_the_presets(spec, largest, smallest_normal):
    assert spec.q_max == largest
    assert 2.0**spec.lowest_exponent == smallest_normal


def test_qpytorch_rounds_half_away():
    for spec in (fq.QPYTORCH_E5M2, fq.QPYTORCH_FP16):
        half = 1 + 2.0 ** -(spec.man + 1)
        assert spec.snap(torch.tensor(half)).item() == 1 + 2.0**-spec.man
    assert fq.QPYTORCH_E4M3.snap(torch.tensor([2.0**-10, 2.0**-11])).tolist() == [2.0**-9, 0]


def test_nf4_is_made_of_normal_quantiles():
    offset = 0.9677083  # arXiv 2305.14314, the code that accompanies it
    halves = [torch.linspace(offset, 0.5, n + 1, dtype=torch.float64)[:-1] for n in (8, 7)]
    upper, low = torch.special.ndtri(halves[0]), -torch.special.ndtri(halves[1])
    values = torch.cat([upper, low, torch.zeros(1)]).sort().values
    assert (values / values.abs().max() - torch.tensor(fq.NF4.values)).abs().max() < 2e-7
    assert fq.NF4.levels().tolist()[:2] == [0, 0.07958029955625534]


@pytest.mark.parametrize(("exp", "man"), [(4, 3), (5, 2), (2, 1), (3, 4), (1, 2)])
def test_flexible_bias_floats_of_int_fp_qsim(exp, man):
    """The bias that puts the largest value at maxval is a real scale: arXiv 2208.09225, section 3."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double()
    maxval = 2.7
    bias = 2**exp - math.log2(maxval) + math.log2(2 - 2.0**-man) - 1
    clipped = x.clamp(-maxval, maxval)
    step = 2 ** ((clipped.abs().log2() + bias).floor().clamp(min=1) - man - bias)
    expected = (clipped / step).round() * step
    spec = fq.FloatFormat(exp, man, bias=0, finite="all")
    scale = fq.compute_scale(torch.tensor(maxval, dtype=torch.float64), spec)
    fake = fq.fake_quantize(x, scale, spec=spec)
    assert (fake - expected).abs().max() < 1e-14  # log2 and powers are rounded
    gradient = torch.func.grad(lambda x: fq.fake_quantize(x, scale, spec=spec).sum())(x)
    assert torch.equal(gradient, (x.abs() <= spec.q_max * scale).double())


# quantization.md 5.1, pytorch-quantization's TestScaledE4M3.
E4M3_ROWS = [
    [-2, -1.75, -1.625, -1.375, -1.25],
    [-1, -0.8125, -0.625, -0.4062, -0.2031],
    [0, 0.2031, 0.4062, 0.625, 0.8125],
    [1, 1.25, 1.375, 1.625, 1.75],
]


E4M3_SCALED_ROWS = [
    [-2, -1.8571, -1.5714, -1.4286, -1.1429],
    [-1, -0.7857, -0.5714, -0.3929, -0.1964],
    [0, 0.1964, 0.3929, 0.5714, 0.7857],
    [1, 1.1429, 1.4286, 1.5714, 1.8571],
]


def test_scaled_e4m3_of_pytorch_quantization():
    x = (torch.arange(20).float() * 0.2 - 2).view(4, 5)
    for amax, rows in ((None, E4M3_ROWS), (2.0, E4M3_SCALED_ROWS)):
        assert (fq.scaled_e4m3(x, amax) - torch.tensor(rows)).abs().max() < 1e-4
    assert fq.scaled_e4m3(torch.tensor([2.0**-25, 1.0]), 2.0**-30).tolist() == [0, 0]
    assert fq.scaled_e4m3(torch.tensor([2.0**-25, 2.0**-23]), 2.0**-20).tolist() == [0, 2.0**-23]
    edge = torch.tensor([500.0, -448.0, 1.0])
    gradient = torch.func.grad(lambda x: fq.scaled_e4m3(x).sum())(edge)
    assert gradient.tolist() == [0, 1, 1]


@pytest.mark.parametrize("name", [n for n, f in PRESETS.items() if isinstance(f, fq.FloatFormat)])
def test_max_may_be_every_value_and_nothing_between(name):
    whole = dataclasses.replace(PRESETS[name], max=None)
    values = [v for v in whole.levels().tolist() if v > 0]
    for value, above in zip(values, [*values[1:], 2 * values[-1]], strict=True):
        assert dataclasses.replace(whole, max=value).q_max == value
        with pytest.raises(ValueError, match="max must be a value"):
            dataclasses.replace(whole, max=(value + above) / 2)


def test_formats_are_made_while_a_model_is_planned():
    capped = fq.FloatFormat(4, 3, finite="fn", max=240.0)
    rules = [fq.OpRule(inputs=capped, weight=capped)]
    plan = fq.make_plan(torch.nn.Linear(2, 2), rules, (torch.ones(1, 2),))
    assert plan.quantizers["linear#0.input"].spec.q_max == 240.0


STOCHASTIC = fq.QuantSpec(rounding="stochastic")
ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fq.FloatFormat(9, 2), ValueError, "exp must be an integer from 1 to 8, got 9"),
        (lambda: fq.FloatFormat(4, 12), ValueError, "man must be an integer from 0 to 10"),
        (lambda: fq.FloatFormat(4, 3, finite="some"), ValueError, "finite must be one of"),
        (lambda: fq.FloatFormat(8, 7, finite="all"), ValueError, "bias must keep the largest"),
        (lambda: fq.FloatFormat(1, 2), ValueError, "bias must leave normal numbers"),
        (lambda: fq.FloatFormat(4, 3, max=441.0), ValueError, "max must be a value"),
        (lambda: fq.FloatFormat(4, 3, max=0.0), ValueError, "max must be a value"),
        (
            lambda: fq.FloatFormat(4, 3, rounding="up"),
            ValueError,
            r"rounding must be one of \['half",
        ),
        (lambda: fq.QuantSpec(rounding="up"), ValueError, r"rounding must be one of \['half_even'"),
        (lambda: fq.QuantSpec(scale_rule="up"), ValueError, r"scale_rule must be one of \['real'"),
        (lambda: fq.Codebook((1.0, 0.0)), ValueError, "values must be 2 to 256 ascending"),
        (
            lambda: fq.Codebook((0.0, 1.0), rounding="floor"),
            ValueError,
            "rounding must be 'nearest'",
        ),
        (lambda: fq.fake_quantize(ONES, 1.0, 3, fq.E4M3), ValueError, "zero_point must be None"),
        (lambda: fq.fake_quantize(ONES, 1.0, spec=STOCHASTIC), ValueError, "got neither"),
        (
            lambda: fq.quantize(ONES, 1.0, noise=ONES),
            ValueError,
            "noise and generator must be None",
        ),
        (
            lambda: fq.quantize(
                ONES, 1.0, generator=torch.Generator(), noise=ONES, spec=STOCHASTIC
            ),
            ValueError,
            "got both",
        ),
        (
            lambda: fq.quantize(ONES, 1.0, noise=3, spec=STOCHASTIC),
            TypeError,
            "noise must be a float",
        ),
        (lambda: fq.round_to_integer(ONES, "stochastic"), ValueError, "noise must be a tensor"),
        (lambda: fq.scaled_e4m3(ONES, -1.0), ValueError, "scaled_e4m3: amax must not be negative"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
