"""What is read out of a histogram: the definitions, and pytorch-quantization's numbers."""

import numpy as np
import pytest
import torch

import fquant as fq
from tests.samples import histogram

METHODS = ("percentile", "entropy", "mse", "l2", "sqnr", "aciq_gauss", "aciq_laplace", "octav")


def test_asking_in_any_order_changes_nothing():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(3)).relu()
    observers = {m: fq.HistogramObserver(num_bins=256, method=m) for m in METHODS}
    state = observers["mse"].update(observers["mse"].init(), x)
    before = [leaf.clone() for leaf in state]
    first = {m: observers[m].amax(state) for m in METHODS}
    again = {m: observers[m].amax(state) for m in reversed(METHODS)}
    assert first == again
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    assert first["mse"] == first["l2"]


def test_per_channel_is_each_channel_alone():
    x = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1.0], [0.01], [300.0]]
    )
    for method in METHODS:
        whole = fq.HistogramObserver(0, 128, method=method)
        alone = fq.HistogramObserver(None, 128, method=method)
        amax = whole.amax(whole.update(whole.init(), x))
        assert amax.shape == (3, 1)
        for channel in range(3):
            assert amax[channel, 0] == alone.amax(alone.update(alone.init(), x[channel]))


def test_read_outs_are_traceable():
    x = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    for method in METHODS:
        observer = fq.HistogramObserver(num_bins=64, method=method, start_bin=4)

        def amax(x, observer=observer):
            return observer.amax(observer.update(observer.init(), x))

        expected = torch.stack([amax(x[0]), amax(x[1])])
        assert torch.equal(torch.func.vmap(amax)(x), expected)


# quantization.md 5.6, from pytorch-quantization on this very sample.
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "entropy"}, 4.3444),
        ({"percentile": 99.99}, 3.9300),
        ({"percentile": 99.9}, 3.3552),
    ],
)
def test_calibrator_anchors(options, expected):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    fixed = fq.FixedWidthHistogramObserver(**options)
    assert round(fixed.amax(fixed.update(fixed.init(), x)).item(), 4) == expected
    if options.get("method") != "entropy":  # the power-of-two grid has another bin width
        dyadic = fq.HistogramObserver(**options)
        assert dyadic.amax(dyadic.update(dyadic.init(), x)).item() == pytest.approx(
            expected, abs=8 / 2048
        )


def entropy_by_the_book(counts, coarse, start_bin, stride):
    """The search of the TensorRT talk, one candidate and one bin at a time."""
    counts = counts.astype(np.float64)
    counts[0] = counts[1]
    divergences = []
    for i in range(start_bin, len(counts) + 1, stride):
        reference = counts[:i].copy()
        reference[-1] += counts[i:].sum()
        approximation = np.zeros(i)
        for cell in range(coarse):
            bins = [j for j in range(i) if j * coarse // i == cell and counts[j] > 0]
            for j in bins:
                approximation[j] = counts[bins].sum() / len(bins)
        p, q = reference / reference.sum(), approximation / approximation.sum()
        with np.errstate(divide="ignore"):
            divergences.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
    best = max(k for k, d in enumerate(divergences) if d == min(divergences))
    return best * stride + start_bin


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("stride", [1, 3])
def test_entropy_against_the_definition(unsigned, stride):
    generator = np.random.default_rng(0)
    for scale in (3.0, 12.0, 40.0):
        counts = np.histogram(np.abs(generator.laplace(0, scale, 3000)), 100, (0, 100))[0]
        counts[-1] += 1
        width = torch.tensor(0.5)
        amax = fq.entropy_amax(
            fq.Histogram(torch.from_numpy(counts), width),
            fq.QuantSpec(4, unsigned),
            stride=stride,
            start_bin=20,
        )
        book = entropy_by_the_book(counts, 16 if unsigned else 8, 20, stride)
        assert amax.item() == book * 0.5


def test_mse_tries_every_edge_from_the_first_bin_to_the_last():
    # All values in the last bin: its end is best, and a clipped bin starts where amax is.
    h = fq.Histogram(torch.tensor([0, 0, 0, 9]), torch.tensor(1.0))
    assert fq.mse_amax(h, fq.QuantSpec(8)).item() == 4
    # All values in the second: with one positive level, amax 1 or 2 err by 1/3 or by 1/3; the weight of
    # clipping decides.
    h = fq.Histogram(torch.tensor([0, 9, 0, 0]), torch.tensor(1.0))
    spec = fq.QuantSpec(2, narrow_range=True)
    assert fq.mse_amax(h, spec, clip_weight=0.5).item() == 1
    assert fq.mse_amax(h, spec, clip_weight=2.0).item() == 2


def test_sqnr_weighs_clipping_three_times():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    h = histogram(x, 64)
    spec = fq.QuantSpec(3)
    assert fq.sqnr_amax(h, spec) == fq.mse_amax(h, spec, clip_weight=3.0) > fq.mse_amax(h, spec)


def test_aciq_counts_the_spread_within_a_bin():
    # One bin of width 1: E x^2 = 1 / 3 for values uniform in it.
    amax = fq.aciq_amax(fq.Histogram(torch.tensor([6, 0]), torch.tensor(1.0)), fq.QuantSpec(4))
    assert amax.item() == pytest.approx(fq.aciq_multiplier(4) / 3**0.5)


def test_entropy_takes_the_last_of_equals():
    counts = torch.tensor([0, 9, 0, 0, 0, 0, 0, 0])
    counts[7] = 0
    amax = fq.entropy_amax(fq.Histogram(counts, torch.tensor(1.0)), fq.QuantSpec(2), start_bin=2)
    assert amax.item() == 2  # candidates beyond the data are no better, and not taken
    counts = torch.tensor([4, 4, 4, 4])  # flat: every even split is lossless, and so is the last
    amax = fq.entropy_amax(fq.Histogram(counts, torch.tensor(1.0)), fq.QuantSpec(2), start_bin=2)
    assert amax.item() == 4


def mse_by_quantizing(counts, width, spec, per_bin=64):
    """Each bin as many equal values, fake-quantized with every edge as amax."""
    bins = len(counts)
    values = (torch.arange(bins * per_bin, dtype=torch.float64) + 0.5) / per_bin * width
    weights = counts.double().repeat_interleave(per_bin)
    errors = []
    for i in range(1, bins + 1):
        scale = fq.compute_scale(torch.tensor(i * width, dtype=torch.float64), spec)
        fake = fq.fake_quantize(values, scale, spec=spec)
        errors.append(((fake - values) ** 2 * weights).sum().item())
    return torch.tensor(errors)


@pytest.mark.parametrize(
    "spec",
    [fq.QuantSpec(3), fq.QuantSpec(4, unsigned=True), fq.E2M1, fq.E4M3, fq.QuantSpec(2)],
)
def test_mse_against_quantizing_every_bin(spec):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    h = histogram(x, 64)
    errors = mse_by_quantizing(h.counts, h.width.item(), spec)
    index = round((fq.mse_amax(h, spec) / h.width).item()) - 1
    assert errors[index] <= errors.min() * (
        1 + 1e-3
    )  # 64 values stand for a bin: 1 / 64^2 each way
    unweighted = fq.sqnr_amax(h, spec, clip_weight=1.0)
    assert unweighted == fq.mse_amax(h, spec)
    assert fq.sqnr_amax(h, spec) >= unweighted
