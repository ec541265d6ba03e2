"""Histogram observers: what is counted."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fquant as fq
from fquant.testing import strategies

NAN, INF = float("nan"), float("inf")


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


def test_tiny_values_end_up_in_the_first_bin():
    observer = fq.HistogramObserver(num_bins=4)
    state = observer.update(observer.init(), torch.tensor([2.0**-110, 2.0**-101]))
    assert int(state.exponent) == -100
    assert state.counts.tolist() == [1, 0, 1, 0]
    state = observer.update(state, torch.tensor([1.0]))  # a shift by 101 bits, beyond int64's 63
    assert state.counts.tolist() == [2, 0, 1, 0]


def test_nothing_but_skipped_zeros_is_a_range_of_zero():
    observer = fq.HistogramObserver(num_bins=4, skip_zeros=True)
    assert observer.amax(observer.update(observer.init(), torch.zeros(3))).item() == 0


def test_fixed_width_skips_zeros_and_merges_with_nothing():
    observer = fq.FixedWidthHistogramObserver(num_bins=4, skip_zeros=True)
    state = observer.update(observer.init(), torch.tensor([0.0, 1.0, 4.0]))
    assert state.counts.tolist() == [0, 1, 0, 1]
    for merged in (observer.merge(observer.init(), state), observer.merge(state, observer.init())):
        assert merged.width == state.width
        assert merged.counts.tolist() == state.counts.tolist()


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
        (lambda: _hist(num_bins=2), "num_bins must be an integer from 4"),
        (lambda: _hist(num_bins=2**25), "num_bins must be an integer from 4 to 16777216"),
        (lambda: _hist(stride=0), "stride must be an integer of at least 1"),
        (lambda: _hist(start_bin=0), "start_bin must be an integer of at least 1"),
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
        (
            lambda: fq.FixedWidthHistogramObserver(num_bins=1),
            "num_bins must be an integer of at least 2",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
