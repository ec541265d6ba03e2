"""Histograms and what is read out of them: laws, theory, and pytorch-quantization's numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fquant as fq
from fquant.testing import strategies

NAN, INF = float("nan"), float("inf")
SAMPLES = 10**6
# The normal and the Laplace distribution's quantiles: a sample without sampling noise.
UNIFORM = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
GAUSS = torch.special.ndtri(UNIFORM)
LAPLACE = torch.where(UNIFORM < 0.5, (2 * UNIFORM).log(), -(2 - 2 * UNIFORM).log())


def histogram(x, num_bins=2048, **options):
    observer = fq.HistogramObserver(num_bins=num_bins, **options)
    return observer.histogram(observer.update(observer.init(), x))


ON_GAUSS = histogram(GAUSS)
# The Laplace tail is too heavy for 1e6 quantiles; here are the exact shares of 1e15 values.
EDGES = torch.arange(8193, dtype=torch.float64) / 200
ON_LAPLACE = fq.Histogram((-(-EDGES).exp().diff() * 1e15).round().long(), torch.tensor(1 / 200))


@given(
    st.lists(strategies.float_tensors(st.just((3, 4)), (torch.float32,)), min_size=1, max_size=4)
)
def test_counts_are_those_of_numpy_on_the_final_range(tensors):
    observer = fq.HistogramObserver(axis=0, num_bins=32)
    state = observer.init()
    for x in tensors:
        state = observer.update(state, x)
    data = torch.cat(tensors, dim=1).abs().double().numpy()
    for channel in range(3):
        end = 2.0 ** int(state.exponent[channel, 0])
        expected = np.histogram(data[channel], bins=32, range=(0.0, end))[0]
        assert state.counts[channel, 0].tolist() == expected.tolist()
        assert end == 2.0**-100 or end / 2 <= data[channel].max() < end


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_values_have_a_bin(dtype):
    info = torch.finfo(dtype)
    observer = fq.HistogramObserver(num_bins=4)
    for value in (info.max, info.tiny, info.smallest_normal / 4, 1.0):
        state = observer.update(observer.init(), torch.tensor([value, 0.0], dtype=dtype))
        assert int(state.counts.sum()) == 2
        tiny = value < 2.0**-100
        assert state.counts.tolist() == (
            [2, 0, 0, 0] if tiny else [1, 0, 1 - (value > 1), value > 1]
        )


def test_nonfinite_values_are_counted_and_reported():
    observer = fq.HistogramObserver(axis=1, num_bins=4, percentile=100)
    x = torch.tensor([[1.0, NAN], [INF, 3.0], [-INF, 0.0]])
    state = observer.update(observer.init(), x)
    assert state.num_nonfinite.tolist() == [[2, 1]]
    assert state.counts.sum(-1).tolist() == [[1, 2]]
    with pytest.warns(fq.NonFiniteWarning, match="3 NaN or infinite values were left out of 3"):
        assert observer.amax(state).tolist() == [[1, 3]]
    nothing = observer.update(observer.init(), torch.full((2, 2), NAN))
    with pytest.raises(ValueError, match="at least one value"):
        observer.amax(nothing)
    fixed = fq.FixedWidthHistogramObserver()
    state = fixed.update(fixed.init(), torch.tensor([NAN, 2.0]))
    assert int(state.num_nonfinite) == int(state.counts.sum()) == 1
    with pytest.warns(fq.NonFiniteWarning, match="1 NaN or infinite values were left out of 1"):
        fixed.amax(state)


@pytest.mark.parametrize("shape", [(5000,), (7, 700)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_traced_counts_are_the_eager_ones(shape, dtype):
    observer = fq.HistogramObserver(None if len(shape) == 1 else 0, num_bins=16, skip_zeros=True)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.view(-1)[:9] = torch.tensor([0.0, -0.0, NAN, INF, -INF, 3.0, -4.0, 4.0, 2.0])
    eager = observer.update(observer.init(), x)
    assert (int(eager.num_nonfinite.sum()), int(eager.num_zeros.sum())) == (3, 2)
    traced = torch.func.vmap(observer.update, (None, 0))(observer.init(), x.unsqueeze(0))
    for actual, expected in zip(traced, eager, strict=True):
        assert torch.equal(actual[0], expected)


def test_values_beyond_float32_have_an_infinite_range():
    observer = fq.HistogramObserver(percentile=100)
    x = torch.tensor([1.0, 2.0**200], dtype=torch.float64)
    assert observer.amax(observer.update(observer.init(), x)) == INF


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_calibration_inside_a_derivative_is_no_part_of_it(transform):
    observer = fq.HistogramObserver(num_bins=16, percentile=100)
    x = torch.tensor([1.0, -3.0])

    def loss(x):
        return (x * observer.amax(observer.update(observer.init(), x))).sum()

    if transform == "grad":
        derivative = torch.func.grad(loss)(x).sum()
    else:
        derivative = torch.func.jvp(loss, (x,), (torch.ones(2),))[1]
    assert derivative == 2 * 3.0


def test_zeros_can_be_skipped_and_zero_groups_stay_exact():
    x = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    kept, skipped = (fq.HistogramObserver(0, 8, skip_zeros=skip) for skip in (False, True))
    state = skipped.update(skipped.init(), x)
    assert state.num_zeros.flatten().tolist() == [3, 1]
    assert state.counts.sum(-1).flatten().tolist() == [0, 2]
    assert kept.update(kept.init(), x).counts.sum(-1).flatten().tolist() == [3, 3]
    for method in ("percentile", "mse", "entropy", "sqnr", "octav", "aciq_gauss"):
        observer = fq.HistogramObserver(0, 8, method=method, start_bin=1)
        amax = observer.amax(observer.update(observer.init(), x))
        assert amax[0].item() == 0
        assert amax[1].item() > 0
        assert fq.fake_quantize(x, fq.compute_scale(amax))[0].tolist() == [0, 0, 0]


def test_counts_beyond_float32():
    observer = fq.HistogramObserver(num_bins=4)
    state = observer.update(observer.init(), torch.ones(2**24))
    state = observer.merge(state, observer.update(observer.init(), torch.ones(1)))
    assert int(state.counts.max()) == 2**24 + 1
    for _ in range(10):
        state = observer.update(state, torch.ones(100))
    assert int(state.counts.sum()) == 2**24 + 1001


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


def sqnr_db(x, y):
    return 10 * torch.log10((x**2).sum() / ((x - y) ** 2).sum()).item()


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


def test_std_from_the_range_alone():
    expected = 9.0 * 0.175 * (1 + np.sqrt(np.pi * np.log(4))) / np.sqrt(2 * np.log(1e6))
    assert fq.gaussian_std_from_range(-4.5, 4.5, 10**6) == pytest.approx(expected)
    assert expected == pytest.approx(1, abs=0.1)


def test_fixed_width_grows_by_appending():
    observer = fq.FixedWidthHistogramObserver(num_bins=4)
    state = observer.update(observer.init(), torch.zeros(3))
    state = observer.update(state, torch.tensor([1.0, 2.0, 4.0]))
    assert state.width.item() == 1
    assert state.counts.tolist() == [3, 1, 1, 1]
    state = observer.update(state, torch.tensor([-9.5]))
    assert state.counts.tolist() == [3, 1, 1, 1, 0, 0, 0, 0, 0, 1]


def _hist(**options):
    return fq.HistogramObserver(**options)


FIXED = fq.FixedWidthHistogramObserver(num_bins=4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _hist(method="median"), r"method must be one of \['percentile'.*got 'median'"),
        (lambda: _hist(percentile=100.1), r"percentile must be in \[0, 100\], got 100.1"),
        (lambda: _hist(percentile=-1), r"percentile must be in \[0, 100\], got -1"),
        (lambda: _hist(percentile=NAN), r"percentile must be in"),
        (
            lambda: _hist(num_bins=100),
            "num_bins must be a power of two from 4 to 16777216, got 100",
        ),
        (lambda: _hist(num_bins=2), "num_bins must be a power of two from 4"),
        (lambda: _hist(num_bins=2**25), "num_bins must be a power of two from 4"),
        (lambda: _hist(stride=0), "stride must be at least 1"),
        (lambda: _hist(start_bin=0), "start_bin must be at least 1"),
        (lambda: _hist().amax(_hist().init()), "state must have seen at least one value"),
        (
            lambda: _hist(axis=1).update(
                _hist(axis=1).update(_hist().init(), torch.ones(2, 3)), torch.ones(2, 4)
            ),
            "HistogramObserver.update: amax must keep its shape",
        ),
        (
            lambda: FIXED.merge(
                FIXED.update(FIXED.init(), torch.ones(1)),
                FIXED.update(FIXED.init(), torch.ones(1) * 2),
            ),
            "one width of bins, 0.25, got 0.5",
        ),
        (lambda: fq.FixedWidthHistogramObserver(width=-1.0), "width must be positive"),
        (lambda: fq.FixedWidthHistogramObserver(num_bins=1), "num_bins must be at least 2"),
        (lambda: fq.aciq_multiplier(8, "cauchy"), r"distribution must be one of.*got 'cauchy'"),
        (lambda: fq.aciq_multiplier(40), "num_bits must be from 0 to 17, got 40"),
        (lambda: fq.aciq_amax(ON_GAUSS, fq.E4M3), "spec must be a QuantSpec"),
        (lambda: fq.gaussian_std_from_range(0.0, 1.0, 1), "num_values must be at least 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
