"""Scale rules: MX, NVFP4, adaptive block floating point, bounds."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fquant as fq
from tests.block_cases import calibrated, mx, scale_of
from tests.samples import sqnr_db

NAN, INF = float("nan"), float("inf")


# quantization.md 5.6, from the tests of microsoft/microxcaling; its "nearest" is half away from zero.
def test_mx_e4m3_saturates_in_the_top_binade():
    x = torch.tensor([485.0, 475, 400, -485, -475, -450, 2**-6, -(2**-6)])
    expected = [448, 448, 416, -448, -448, -448, 2**-6, -(2**-6)]
    assert calibrated(x, mx(fq.E4M3, 8, rounding="half_away")).tolist() == expected
    # Rounding the exponent up instead, nothing is clipped.
    up = mx(fq.E4M3, 8, rule="power_of_two")
    assert scale_of(x, up).tolist() == [2]
    assert calibrated(x, up)[0].item() == 480


MX_E4M3_X = """
-0.582733273506 -0.256973713636  0.506033003330  0.400039970875 -0.437093466520  1.275019764900
-2.123294353485  1.514909625053 -2.660086154938 -0.200791791081 -0.060985822231 -0.209203109145
 2.385987281799  0.062245476991  0.217003762722 -0.857734560966  0.507945835590  0.896152675152
-0.751049160957 -0.488164335489  0.805381953716 -0.172028362751  0.271137863398 -0.503807783127
 1.879478693008 -0.294227510691  0.968807995319  0.670037031174 -0.871595799923  0.304561793804
-0.567594051361 -1.265962004662"""


MX_E4M3_Y = """
-0.5625 -0.25 0.5 0.40625 -0.4375 1.25 -2.0 1.5 -2.75 -0.203125 -0.0625 -0.203125 2.5 0.0625 0.21875
-0.875 0.5 0.875 -0.75 -0.5 0.8125 -0.171875 0.28125 -0.5 1.875 -0.28125 1.0 0.6875 -0.875 0.3125
-0.5625 -1.25"""


@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
def test_mx_e4m3_block_of_32(rounding):
    x, y = numbers(MX_E4M3_X), numbers(MX_E4M3_Y)
    assert torch.equal(calibrated(x, mx(fq.E4M3, rounding=rounding)), y)


def test_mx_scale_of_five_bits():
    leads = [2.0**16, 2.0**15, 2.0**-16, 2.0**-17, 2.0**-15, 2.0**-14, 1.0, 0.0]
    expected = [NAN, 2.0**15, 2.0**-15, 0.0, 2.0**-15, 2.0**-14, 1.0, 0.0]  # theirs says inf or NaN
    x = torch.zeros(8, 8)
    x[:, 0] = torch.tensor(leads)
    spec = mx(fq.QuantSpec(2, narrow_range=True), 8, axis=(0, 1), rounding="half_away")
    spec = dataclasses.replace(spec, block=(1, 8))
    y = calibrated(x, spec, scale_bits=5)
    assert bool(y[0].isnan().all())
    assert y[1:, 0].tolist() == expected[1:]
    assert bool((y[1:, 1:] == 0).all())


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("spec", [fq.E4M3, fq.E2M1, fq.QuantSpec(4, narrow_range=True)])
def test_mx_one_bad_value_makes_its_block_nan(spec, bad):
    x = torch.tensor([bad, 0.0, 2.0**127, 0.0, 1.0, 0.0, 0.0, 1.0])
    y = calibrated(x, mx(spec, 4))
    assert bool(y[:4].isnan().all())
    assert y[4:].tolist() == [1, 0, 0, 1]


def test_mx_int4_leaves_minus_two_unused():
    x = torch.tensor([[-1.0, -1.75, -1.99, 1.99], [1.0, -1.75, -1.99, 1.99]])
    spec = mx(fq.QuantSpec(4, narrow_range=True), (1, 4), (0, 1), rounding="half_away")
    expected = [[-1, -1.75, -1.75, 1.75], [1, -1.75, -1.75, 1.75]]
    assert calibrated(x, spec).tolist() == expected


MX_INT8_X = """
1 1 1 1 1 1 1 1 1 1
1 1 1 1 1 2 2 2 2 2
-1 -1 -1 -1 -1 -2 -2 -2 -2 -2
1 1 1 1 1 -2 -2 -2 -2 -2
1.015625 1.0234375 1.03125 1.0390625 1.25 1.2578125 1.9375 1.9453125 1.984375 1.9921875
-1.984375 -1.9765625 -1.96875 -1.9609375 -1.9375 -1.9296875 -1.75 -1.7421875 -1 -1.9921875
1.99609375 1.98828125 0 0.00390625 0.0078125 0.01171875 -0.015625 -0.01171875 -0.0078125 -0.00390625"""


MX_INT8_Y = """
1 1 1 1 1 1 1 1 1 1
1 1 1 1 1 2 2 2 2 2
-1 -1 -1 -1 -1 -2 -2 -2 -2 -2
1 1 1 1 1 -2 -2 -2 -2 -2
1.015625 1.03125 1.03125 1.046875 1.25 1.265625 1.9375 1.953125 1.984375 1.984375
-1.984375 -1.984375 -1.96875 -1.96875 -1.9375 -1.9375 -1.75 -1.75 -1 -1.984375
1.984375 1.984375 0 0 0.015625 0.015625 -0.015625 -0.015625 -0.015625 0"""


def numbers(text):
    return torch.tensor([float(v) for v in text.split()])


def test_mx_int8_hardware_table():
    x, y = numbers(MX_INT8_X), numbers(MX_INT8_Y)
    spec = mx(fq.QuantSpec(8, narrow_range=True), 10, rounding="half_away")
    assert torch.equal(calibrated(x, spec), y)


def test_mx_shared_exponents():
    highest = {fq.E4M3: 8, fq.E5M2: 15, fq.E3M2: 4, fq.E2M3: 2, fq.E2M1: 2}
    for spec, emax in highest.items():
        for amax in (0.7, 1.0, 3.9999, 2.0**-30, 2.0**100):
            scale = scale_of(torch.tensor([amax]), mx(spec, 1)).item()
            assert scale == 2.0 ** (np.floor(np.log2(amax)) - emax)


@given(
    st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from([fq.E4M3, fq.E2M1, fq.QuantSpec(5)])
)
def test_power_of_two_scale_is_the_smallest_that_reaches(amax, spec):
    spec = dataclasses.replace(spec, scale_rule="power_of_two")
    scale = fq.compute_scale(torch.tensor(amax), spec).double().item()
    assert np.log2(scale) == round(np.log2(scale))
    assert scale * spec.q_max >= amax > scale / 2 * spec.q_max


@pytest.mark.parametrize("exponent", [-127, -126, 0, 100])
def test_power_of_two_scale_of_what_it_reaches_exactly(exponent):
    for rule in ("power_of_two", "power_of_two_floor"):
        spec = dataclasses.replace(fq.E2M1, scale_rule=rule)
        scale = fq.compute_scale(torch.tensor(6 * 2.0**exponent), spec)
        assert scale.item() == 2.0**exponent


def test_extreme_and_zero_blocks():
    x = torch.tensor([0.0, 0.0, 1e-45, 0.0, 2.0**-127, 0.0, 3e38, 0.0])
    for rule in ("power_of_two", "power_of_two_floor"):
        y = calibrated(x, mx(fq.E2M1, 2, rule=rule))
        assert y[:2].tolist() == [0, 0]
        assert y[4].item() == 2.0**-127
        assert y[6].item() > 2e38
    assert scale_of(x[:2], mx(fq.E2M1, 2)).tolist() == [1]


NVFP4 = fq.NVFP4


def test_nvfp4_has_two_levels():
    assert (NVFP4.axis, NVFP4.block) == (-1, 16)
    x = (
        torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-3, 3, 4)[:, None]
    )
    spec = dataclasses.replace(NVFP4, axis=(0, 1), block=(1, 16))
    amax = fq.compute_amax(x, spec.axis, spec.block)
    blocks, tensor = fq.two_level_scales(amax)
    assert torch.equal(fq.compute_scale(amax, spec), blocks * tensor)
    assert torch.equal(blocks.to(torch.float8_e4m3fn).float(), blocks)
    assert blocks.max().item() == 448
    assert tensor.item() == pytest.approx(x.abs().max().item() / (448 * 6))
    errors = (calibrated(x, spec) - x).abs()
    # Half the widest gap of E2M1 is 1 step; rounding of the block scale clips by 1 / 16 at most.
    assert bool((errors <= 1.07 * fq.granularity.spread(blocks * tensor, x.shape)).all())
    # One-level scales of 8 bits do worse.
    assert sqnr_db(x[1], calibrated(x, spec)[1]) > sqnr_db(x[1], calibrated(x, mx(fq.E2M1))[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_levels_of_a_half_amax_are_those_of_its_float32(dtype):
    amax = torch.tensor([0.0, 0.3, 1.7, 400.0]).to(dtype)
    for half, wide in zip(
        fq.two_level_scales(amax), fq.two_level_scales(amax.float()), strict=True
    ):
        assert half.dtype == torch.float32
        assert torch.equal(half, wide)
    blocks, tensor = fq.two_level_scales(amax)
    assert torch.equal(fq.compute_scale(amax, NVFP4), blocks * tensor)


def test_two_levels_of_nothing_and_of_nan():
    blocks, tensor = fq.two_level_scales(torch.ones(0, 2))
    assert (blocks.shape, tensor.item()) == ((0, 2), 1)
    blocks, tensor = fq.two_level_scales(torch.tensor([1.0, NAN]))
    assert bool((blocks * tensor).isnan().all())
    with pytest.raises(ValueError, match=r"two_level_scales: amax must not be negative, got -1\.0"):
        fq.two_level_scales(torch.tensor([1.0, -1.0]))
    with pytest.raises(TypeError, match="two_level_scales: amax must be a floating-point tensor"):
        fq.two_level_scales(torch.tensor([1]))


def test_adaptive_block_floating_point():
    """arXiv 2205.06287: a bfloat16 maximum per block, integers of b bits in its units."""
    x = torch.randn(256, generator=torch.Generator().manual_seed(0))
    spec = mx(fq.QuantSpec(6, narrow_range=True), 16, rule="bfloat16")
    tops = x.abs().view(16, 16).amax(1).bfloat16().float()
    units = x.view(16, 16) / (tops / 31)[:, None]
    expected = units.round().clamp(-31, 31) * (tops / 31)[:, None]
    assert torch.equal(calibrated(x, spec), expected.flatten())


# quantization.md 3.1 and 3.2: where amax lands, for Qwix and AQT.
@pytest.mark.parametrize(
    ("bits", "bound", "reach"),
    [
        (8, "q_max", 127.0),
        (8, "edge", 127.5),
        (8, "full", 128.0),
        (2, "q_max", 1.0),
        (2, "edge", 1.5),
        (2, "full", 2.0),
        (4, "edge", 7.5),
    ],
)
def test_bounds_of_aqt_and_qwix(bits, bound, reach):
    scale = fq.compute_scale(torch.tensor(3.0), fq.QuantSpec(bits), bound)
    assert scale.item() == np.float32(3) / np.float32(reach)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fq.compute_scale(torch.ones(1), bound="half"), ValueError, "bound must be one of"),
        (
            lambda: fq.compute_scale(torch.ones(1), fq.E4M3, "edge"),
            ValueError,
            "bound must be one of",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
