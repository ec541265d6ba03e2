"""Observers: the laws of init, update and merge, and calibration as a fold."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import fquant as fq
from fquant.testing import strategies

batches = st.lists(
    strategies.float_tensors(st.tuples(st.integers(0, 4), st.just(3)), (torch.float32,)), max_size=6
)
axes = st.sampled_from([None, 1])
any_observer = (
    st.builds(fq.MaxObserver, axis=axes)
    | st.builds(fq.MinMaxObserver, axis=axes)
    | st.builds(fq.MovingAverageObserver, momentum=st.sampled_from([0.0, 0.5, 0.99]), axis=axes)
    | st.builds(fq.HistogramObserver, axis=axes, num_bins=st.just(64), skip_zeros=st.booleans())
    | st.builds(fq.FixedWidthHistogramObserver, width=st.just(50.0), skip_zeros=st.booleans())
)
order_free_observer = any_observer.filter(lambda o: not isinstance(o, fq.MovingAverageObserver))


def after(observer, tensors, state=None):
    state = observer.init() if state is None else state
    for x in tensors:
        state = observer.update(state, x)
    return state


def assert_states(actual, expected, exact):
    tolerance = 0.0 if exact else 1e-5  # a few float32 roundings of values up to 1e4
    for a, b in zip(actual, expected, strict=True):
        assert_close(a.expand_as(b), b, rtol=tolerance, atol=tolerance)


@given(any_observer, batches, batches)
def test_merge_is_update_over_both(observer, first, second):
    merged = observer.merge(after(observer, first), after(observer, second))
    exact = not isinstance(observer, fq.MovingAverageObserver)
    assert_states(merged, after(observer, first + second), exact)


@given(any_observer, batches)
def test_init_is_the_identity_of_merge(observer, tensors):
    state = after(observer, tensors)
    assert_states(observer.merge(observer.init(), state), state, exact=True)
    assert_states(observer.merge(state, observer.init()), state, exact=True)


@given(any_observer, batches, batches, batches)
def test_merge_is_associative(observer, first, second, third):
    a, b, c = (after(observer, tensors) for tensors in (first, second, third))
    left = observer.merge(observer.merge(a, b), c)
    right = observer.merge(a, observer.merge(b, c))
    assert_states(left, right, not isinstance(observer, fq.MovingAverageObserver))


@given(order_free_observer, batches, batches)
def test_merge_is_commutative(observer, first, second):
    a, b = after(observer, first), after(observer, second)
    assert_states(observer.merge(a, b), observer.merge(b, a), exact=True)


@given(order_free_observer, batches)
def test_batches_are_one_tensor(observer, tensors):
    together = torch.cat([*tensors, torch.zeros(0, 3)])
    assert_states(after(observer, tensors), after(observer, [together]), exact=True)


@given(batches)
def test_max_is_the_amax_of_everything(tensors):
    everything = torch.cat([*tensors, torch.zeros(0, 3)])
    observer = fq.MaxObserver(axis=1)
    state = after(observer, tensors)
    assert int(state.num_values) == everything.numel()
    if everything.numel():
        assert torch.equal(observer.amax(state), fq.compute_amax(everything, axis=1))


@pytest.mark.parametrize("values", [[1.0, 3.0], [-3.0, -1.0], [-3.0, 2.0]])
def test_min_max_are_the_extremes(values):
    observer = fq.MinMaxObserver()
    state = after(observer, [torch.tensor(values)])
    assert [end.item() for end in observer.range(state)] == [min(values), max(values)]
    assert observer.amax(state).item() == 3


def test_an_empty_batch_is_not_averaged():
    observer = fq.MovingAverageObserver(momentum=0.5)
    state = after(observer, [torch.ones(2), torch.ones(0)])
    assert (int(state.batches), observer.amax(state).item()) == (1, 1)


@given(any_observer, batches)
def test_asking_and_updating_change_nothing(observer, tensors):
    tensors = [torch.full((1, 3), 60.0), *tensors]
    state = after(observer, tensors)
    before = copy.deepcopy(state)
    first = observer.amax(state)
    observer.update(state, torch.full((2, 3), 1e6))
    observer.merge(state, state)
    assert torch.equal(observer.amax(state), first)
    assert_states(state, before, exact=True)


@pytest.mark.peer
def test_moving_average_against_torch_ao():
    from torch.ao.quantization import MovingAverageMinMaxObserver

    theirs = MovingAverageMinMaxObserver(averaging_constant=0.1)
    ours = fq.MovingAverageObserver(momentum=0.9)
    state = ours.init()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = torch.randn(100, generator=generator).abs()
        theirs(x)
        state = ours.update(state, x)
    assert ours.amax(state).item() == pytest.approx(theirs.max_val.item(), rel=1e-5)


@pytest.mark.parametrize(
    "observer",
    [
        fq.MaxObserver(1),
        fq.MinMaxObserver(1),
        fq.MovingAverageObserver(axis=1),
        fq.HistogramObserver(num_bins=64),
        fq.HistogramObserver(1, num_bins=64, skip_zeros=True),
    ],
)
def test_compiles_and_vmaps(observer):
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    x[1] *= 9.0
    x[0, 0, 2] = 0.0
    if isinstance(observer, fq.HistogramObserver):
        x[1, 2, 1] = torch.nan
    state = observer.update(observer.init(), x[0])
    torch._dynamo.reset()
    compiled = torch.compile(observer.update, fullgraph=True, backend="aot_eager")(state, x[1])
    assert_states(compiled, observer.update(state, x[1]), exact=True)
    stacked = torch.func.vmap(observer.update, (None, 0))(state, x)
    for i in range(2):
        assert_states(
            pytree.tree_map(lambda leaf, i=i: leaf[i], stacked),
            observer.update(state, x[i]),
            exact=True,
        )


def test_calibrate_is_a_fold():
    observers = {"in": fq.MaxObserver(), "out": fq.MovingAverageObserver(momentum=0.5)}
    data = [torch.tensor([1.0, -4.0]), torch.tensor([2.0, 3.0])]

    def activations(x):
        return {"in": x, "out": x.relu(), "unwatched": x}

    stats = fq.calibrate(activations, data, observers, progress=False)
    amax = fq.observed_amax(stats, observers)
    assert {site: value.item() for site, value in amax.items()} == {"in": 4.0, "out": 2.0}
    half = fq.calibrate(activations, data[:1], observers, progress=False)
    resumed = fq.calibrate(activations, data[1:], observers, half, progress=False)
    split = fq.merge_stats(
        half, fq.calibrate(activations, data[1:], observers, progress=False), observers
    )
    for other in (resumed, split):
        assert fq.observed_amax(other, observers) == amax
    assert int(half["in"].num_values) == 2  # resuming wrote nothing into it


def test_progress_bar_can_be_shown_and_hidden(capsys):
    pytest.importorskip("tqdm")
    observers = {"x": fq.MaxObserver()}
    fq.calibrate(lambda x: {"x": x}, [torch.ones(1)], observers, progress=False)
    assert capsys.readouterr().err == ""
    fq.calibrate(lambda x: {"x": x}, [torch.ones(1)], observers, progress=True)
    assert "calibrate" in capsys.readouterr().err


def _observe(observers, *xs):
    return fq.calibrate(lambda x: {"s": x}, xs, observers, progress=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fq.observed_amax(_observe({"s": fq.MaxObserver()}), {"s": fq.MaxObserver()}),
            "'s'.*at least one",
        ),
        (
            lambda: _observe({"s": fq.MaxObserver(1)}, torch.ones(2, 3), torch.ones(2, 4)),
            "'s'.*shape",
        ),
        (lambda: fq.observed_amax({"s": None}, {}), r"lacks \['s'\]"),
        (lambda: fq.merge_stats({"s": None}, {}, {}), r"lacks \['s'\]"),
        (lambda: fq.MinMaxObserver().range(fq.MinMaxObserver().init()), "at least one value"),
        (lambda: fq.MovingAverageObserver(1.0), r"momentum must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
