"""Calibration methods against theory: the tables of best quantizers and clipping values."""

import numpy as np
import pytest
import torch

import fquant as fq
from tests.samples import GAUSS, LAPLACE, SAMPLES, histogram, sqnr_db

ON_GAUSS = histogram(GAUSS)
# The Laplace tail is too heavy for 1e6 quantiles; here are the exact shares of 1e15 values.
EDGES = torch.arange(2049, dtype=torch.float64) / 100
ON_LAPLACE = fq.Histogram((-(-EDGES).exp().diff() * 1e15).round().long(), torch.tensor(1 / 100))
# quantization.md 5.4: the best amax of a uniform quantizer with 2^b - 1 levels (Max 1960), and the
# SQNR it gives.
BEST_UNIFORM = [
    (2, 1.2240, 7.21, 2.0000, 5.78),
    (3, 1.9523, 13.29, 3.4864, 10.80),
    (4, 2.4739, 18.90, 4.8199, 15.62),
    (5, 2.8987, 24.33, 6.0980, 20.42),
    (6, 3.2701, 29.71, 7.3586, 25.26),
    (7, 3.6075, 35.11, 8.6178, 30.18),
    (8, 3.9205, 40.54, 9.8827, 35.18),
]


@pytest.mark.parametrize(("bits", "gauss", "gauss_db", "laplace", "laplace_db"), BEST_UNIFORM)
def test_mse_observer_lands_within_a_bin_of_theory(bits, gauss, gauss_db, laplace, laplace_db):
    spec = fq.QuantSpec(bits, narrow_range=True)
    for x, h, amax, db in (
        (GAUSS, ON_GAUSS, gauss, gauss_db),
        (LAPLACE, ON_LAPLACE, laplace, laplace_db),
    ):
        found = fq.mse_amax(h, spec)
        assert abs(found.item() - amax) <= h.width.item()
        fake = fq.fake_quantize(x, fq.compute_scale(found, spec), spec=spec)
        # Two decimals in the table; and 1e6 quantiles stop at 13.1, 0.055 dB at 8 bits of Laplace.
        assert sqnr_db(x, fake) == pytest.approx(db, abs=0.06 if bits == 8 else 0.02)


@pytest.mark.parametrize(("bits", "amax"), [row[:2] for row in BEST_UNIFORM])
def test_mse_observer_on_random_normal_samples(bits, amax):
    # At 8 bits some 90 of 1e6 samples lie beyond the best amax, which moves it by about 0.04; bins of
    # 1/16 are the finest that sampling noise lets hit.
    observer = fq.HistogramObserver(num_bins=128, method="mse", spec=fq.QuantSpec(bits))
    x = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0))
    state = observer.update(observer.init(), x)
    assert abs(observer.amax(state).item() - amax) <= observer.histogram(state).width.item()


# Mid-rise quantizers (2^b levels, none at 0): the error of half-integer levels, and Lloyd-Max.
@pytest.mark.parametrize(
    ("bits", "alpha", "db"),
    [(2, 1.9914, 9.25), (3, 2.3441, 14.27), (4, 2.6816, 19.38), (5, 3.0102, 24.57)],
)
def test_mid_rise_levels_as_a_codebook(bits, alpha, db):
    n = 2**bits
    spec = fq.Codebook(tuple((2 * i - n + 1) / n for i in range(n)))
    fake = fq.fake_quantize(GAUSS, alpha, spec=spec)
    assert sqnr_db(GAUSS, fake) == pytest.approx(db, abs=0.01)
    found = fq.mse_amax(ON_GAUSS, spec) / spec.q_max
    assert abs(found.item() - alpha) <= ON_GAUSS.width.item() / spec.q_max


@pytest.mark.parametrize(
    ("levels", "mse"), [(2, 0.36338), (4, 0.117482), (8, 0.034548), (16, 0.009501), (32, 0.002505)]
)
def test_lloyd_max_codebooks(levels, mse):
    x = GAUSS[5::10].contiguous()  # Lloyd's iteration on a tenth of the quantiles
    values = torch.linspace(-2, 2, levels, dtype=torch.float64)
    total = torch.cat([x.new_zeros(1), x.cumsum(0)])
    for _ in range(1500):
        ends = torch.searchsorted(x, (values[1:] + values[:-1]) / 2)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(x))])
        values = total[ends].diff() / ends.diff()
    fake = fq.fake_quantize(x, 1.0, spec=fq.Codebook(tuple(values.tolist())))
    assert ((fake - x) ** 2).mean().item() == pytest.approx(mse, rel=0.005)


# quantization.md 5.2, to the decimals that it has.
GAUSS_ACIQ = [1.2399, 1.7106, 2.1516, 2.5591, 2.9362, 3.2869, 3.6151, 3.9240]
LAPLACE_ACIQ = [1.8628, 2.8307, 3.8972, 5.0286, 6.2048, 7.4131, 8.6456, 9.8968]
# quantization.md 5.3, for 2 to 8 bits.
GAUSS_OCTAV = [1.7388, 2.1611, 2.5621, 2.9371, 3.2872, 3.6152, 3.9241]
LAPLACE_OCTAV = [2.8737, 3.9133, 5.0341, 6.2065, 7.4137, 8.6458, 9.8968]


@pytest.mark.parametrize("bits", range(1, 9))
def test_aciq_constants(bits):
    assert fq.aciq_multiplier(bits) == pytest.approx(GAUSS_ACIQ[bits - 1], abs=6e-5)
    assert fq.aciq_multiplier(bits, "laplace") == pytest.approx(LAPLACE_ACIQ[bits - 1], abs=6e-5)


def test_aciq_published_digits():
    published = [1.7106351863419305, 2.1515927416420935, 2.559136455058456, 2.9362006203824396]
    for bits, value in enumerate(published, start=2):
        assert fq.aciq_multiplier(bits) == pytest.approx(value, rel=1e-6)  # a search to 1e-6
    assert fq.aciq_multiplier(0, "laplace") == pytest.approx(1.05, abs=0.01)
    assert fq.aciq_multiplier(9, "laplace") == pytest.approx(11.16, abs=0.01)


@pytest.mark.parametrize("bits", range(2, 9))
def test_analytic_methods_on_data(bits):
    spec = fq.QuantSpec(bits)
    for amax, expected in (
        (fq.aciq_amax(ON_GAUSS, spec), GAUSS_ACIQ[bits - 1]),
        (fq.aciq_amax(ON_LAPLACE, spec, "laplace"), LAPLACE_ACIQ[bits - 1]),
        (fq.octav_amax(ON_GAUSS, spec), GAUSS_OCTAV[bits - 2]),
        (fq.octav_amax(ON_LAPLACE, spec), LAPLACE_OCTAV[bits - 2]),
    ):
        assert amax.item() == pytest.approx(expected, abs=0.002)
    unsigned = fq.QuantSpec(bits, unsigned=True)
    assert fq.aciq_amax(ON_GAUSS, unsigned) == fq.aciq_amax(ON_GAUSS, fq.QuantSpec(bits + 1))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_octav_splits_the_bin_that_holds_the_range(bits):
    # Uniform values: s (c s + 1 - s) = (1 - s^2) / 2 with c = 4^-b / 3, whatever the bins are.
    c = 4.0**-bits / 3
    root = (-1 + (1 + 4 * (c - 0.5) / 2) ** 0.5) / (2 * (c - 0.5))
    for bins in (1, 3, 64):
        h = fq.Histogram(torch.full((bins,), 7), torch.tensor(1 / bins))
        amax = fq.octav_amax(h, fq.QuantSpec(bits), iterations=500)
        assert amax.item() == pytest.approx(root, rel=1e-3)


def test_std_from_the_range_alone():
    expected = 9.0 * 0.175 * (1 + np.sqrt(np.pi * np.log(4))) / np.sqrt(2 * np.log(1e6))
    assert fq.gaussian_std_from_range(-4.5, 4.5, 10**6) == pytest.approx(expected)
    assert expected == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fq.aciq_multiplier(8, "cauchy"), r"distribution must be one of.*got 'cauchy'"),
        (lambda: fq.aciq_multiplier(40), "num_bits must be an integer from 0 to 17, got 40"),
        (lambda: fq.aciq_amax(ON_GAUSS, fq.E4M3), "spec must be a QuantSpec"),
        (lambda: fq.gaussian_std_from_range(0.0, 1.0, 1), "num_values must be at least 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
