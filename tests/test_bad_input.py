"""Bad input to tensor functions, formats, observers and read-outs: refused by name, with the value."""

import dataclasses
import re

import pytest
import torch

import fquant as fq

NAN = float("nan")
X = torch.ones(2, 3)
INTS = torch.ones(2, 3, dtype=torch.int32)
ONE = torch.tensor(1.0)
STOCHASTIC = fq.QuantSpec(rounding="stochastic")
COUNTS = torch.tensor([1, 2, 3, 4])
H = fq.Histogram(COUNTS, torch.tensor(0.5))
NO_BINS = fq.Histogram(COUNTS[:0], torch.tensor(0.5))
READ_OUTS = (
    fq.percentile_amax,
    fq.entropy_amax,
    fq.mse_amax,
    fq.sqnr_amax,
    fq.aciq_amax,
    fq.octav_amax,
)
OBSERVERS = (
    fq.MaxObserver,
    fq.MinMaxObserver,
    fq.MovingAverageObserver,
    fq.HistogramObserver,
    fq.FixedWidthHistogramObserver,
)


def refuses(error, message, function, *args, **kwargs):
    """A test case: the call raises this error, whose message begins with the function's name."""
    return pytest.param(error, message, lambda: function(*args, **kwargs), id=message[:60])


CASES = [
    refuses(TypeError, "compute_amax: axis must be an int", fq.compute_amax, X, "a"),
    refuses(TypeError, "compute_amax: axis must be an int", fq.compute_amax, X, 1.0),
    refuses(TypeError, "compute_amax: block must be an int", fq.compute_amax, X, 0, 1.5),
    refuses(ValueError, "compute_amax: block must be at least 1, got 0", fq.compute_amax, X, 0, 0),
    refuses(
        ValueError,
        "compute_amax: block must be at least 1, got (1, -1)",
        fq.compute_amax,
        X,
        (0, 1),
        (1, -1),
    ),
    refuses(TypeError, "compute_scale: spec must be a QuantSpec", fq.compute_scale, ONE, 8),
    refuses(
        ValueError,
        "compute_scale: scale_bits must be an integer from 2 to 8, got 20",
        fq.compute_scale,
        ONE,
        scale_bits=20,
    ),
    refuses(
        TypeError,
        "compute_scale_zero_point: spec must be a QuantSpec",
        fq.compute_scale_zero_point,
        -ONE,
        ONE,
        fq.E4M3,
    ),
    refuses(ValueError, "two_level_scales: q_max must be positive", fq.two_level_scales, ONE, 0.0),
    refuses(TypeError, "quantize: spec must be a QuantSpec", fq.quantize, X, 1.0, spec=8),
    refuses(TypeError, "quantize: scale must be a number", fq.quantize, X, "1"),
    refuses(
        ValueError,
        "quantize: noise must have a shape that broadcasts to x's (2, 3), got (7,)",
        fq.quantize,
        X,
        1.0,
        spec=STOCHASTIC,
        noise=torch.ones(7),
    ),
    refuses(
        ValueError,
        "fake_quantize: noise must have a shape that broadcasts to x's (2, 3), got (5, 2, 3)",
        fq.fake_quantize,
        X,
        1.0,
        spec=STOCHASTIC,
        noise=torch.ones(5, 2, 3),
    ),
    refuses(
        TypeError,
        "quantize: generator must be a torch.Generator, got 3",
        fq.quantize,
        X,
        1.0,
        spec=STOCHASTIC,
        generator=3,
    ),
    refuses(TypeError, "round_to_integer: x must be a floating", fq.round_to_integer, INTS),
    refuses(TypeError, "round_to_integer: x must be a floating", fq.round_to_integer, [1.0]),
    refuses(
        ValueError,
        "round_to_integer: noise must have a shape",
        fq.round_to_integer,
        X,
        "stochastic",
        torch.ones(5),
    ),
    refuses(
        TypeError,
        "tensor_quant: output_dtype must be a torch.dtype",
        fq.tensor_quant,
        X,
        1.0,
        output_dtype="int8",
    ),
    refuses(ValueError, "QuantSpec: num_bits must be an integer from 2 to 16", fq.QuantSpec, -1),
    refuses(ValueError, "QuantSpec: num_bits must be an integer from 2 to 16", fq.QuantSpec, 8.0),
    refuses(TypeError, "QuantSpec: axis must be an int", fq.QuantSpec, axis="a"),
    refuses(ValueError, "QuantSpec: block must be at least 1", fq.QuantSpec, axis=0, block=0),
    refuses(ValueError, "FloatFormat: exp must be an integer from 1 to 8", fq.FloatFormat, 4.0, 3),
    refuses(ValueError, "FloatFormat: exp must be an integer from 1 to 8", fq.FloatFormat, "4", 3),
    refuses(ValueError, "FloatFormat: man must be an integer from 0 to 7", fq.FloatFormat, 8, 8),
    refuses(TypeError, "FloatFormat: bias must be an int", fq.FloatFormat, 4, 3, bias=2.5),
    refuses(ValueError, "FloatFormat: max must be a value", fq.FloatFormat, 4, 3, max=NAN),
    refuses(ValueError, "FloatFormat: block must be at least 1", fq.FloatFormat, 4, 3, block=0),
    refuses(TypeError, "Codebook: values must be a tuple", fq.Codebook, [0.0, 1.0]),
    refuses(TypeError, "Codebook: values must be a tuple", fq.Codebook, "ab"),
    refuses(ValueError, "Codebook: values must be 2 to 256", fq.Codebook, (0.0, NAN)),
    refuses(ValueError, "Codebook: values must be 2 to 256", fq.Codebook, (0.0, float("inf"))),
    refuses(ValueError, "Codebook: values must be 2 to 256", fq.Codebook, (-2.0, -1.0)),
    refuses(ValueError, "fake_quantize_lsq: scale must be positive", fq.fake_quantize_lsq, X, 0.0),
    refuses(
        TypeError,
        "fake_quantize_lsq: spec must be a QuantSpec",
        fq.fake_quantize_lsq,
        X,
        1.0,
        spec=fq.E4M3,
    ),
    refuses(TypeError, "lsq_scale: spec must be a QuantSpec", fq.lsq_scale, X, fq.E4M3),
    refuses(TypeError, "lsq_plus_scale: spec must be a QuantSpec", fq.lsq_plus_scale, X, fq.E4M3),
    refuses(
        ValueError, "learned_clip: high must not be below low", fq.learned_clip, X, ONE, ONE - 2
    ),
    refuses(ValueError, "fake_quantize_pact: alpha must be positive", fq.fake_quantize_pact, X, -1),
    refuses(
        ValueError,
        "fake_quantize_gradient: scale must be positive",
        fq.fake_quantize_gradient,
        X,
        scale=-1.0,
    ),
    refuses(
        TypeError, "fake_quantize_gradient: spec must be", fq.fake_quantize_gradient, X, "E5M2"
    ),
    refuses(TypeError, "straight_through: grid must be a", fq.straight_through, [1.0], X),
    refuses(TypeError, "straight_through: clipped must be a", fq.straight_through, X, INTS),
    refuses(
        ValueError,
        "straight_through: clipped must have the shape of grid, (2, 3), got (3,)",
        fq.straight_through,
        X,
        X[0],
    ),
    refuses(TypeError, "percentile_amax: percentile must be a", fq.percentile_amax, H, "99"),
    refuses(ValueError, "percentile_amax: percentile must be in", fq.percentile_amax, H, NAN),
    refuses(TypeError, "entropy_amax: spec must be a", fq.entropy_amax, H, 8),
    refuses(TypeError, "mse_amax: spec must be a", fq.mse_amax, H, 8),
    refuses(ValueError, "mse_amax: stride must be an integer", fq.mse_amax, H, stride=1.5),
    refuses(ValueError, "mse_amax: clip_weight must not be", fq.mse_amax, H, clip_weight=-1.0),
    refuses(ValueError, "octav_amax: iterations must be", fq.octav_amax, H, iterations=0),
    refuses(ValueError, "aciq_multiplier: num_bits must be an integer", fq.aciq_multiplier, "8"),
    refuses(
        ValueError,
        "gaussian_std_from_range: maximum must not be below minimum",
        fq.gaussian_std_from_range,
        1.0,
        0.0,
        5,
    ),
    refuses(
        ValueError, "MovingAverageObserver: momentum must be in", fq.MovingAverageObserver, "half"
    ),
    refuses(
        ValueError,
        "HistogramObserver: num_bins must be an integer",
        fq.HistogramObserver,
        num_bins=64.0,
    ),
    refuses(
        ValueError,
        "HistogramObserver: spec must be a QuantSpec for 'aciq_gauss'",
        fq.HistogramObserver,
        method="aciq_gauss",
        spec=fq.E4M3,
    ),
    refuses(
        TypeError, "HistogramObserver: spec must be a QuantSpec", fq.HistogramObserver, spec="int8"
    ),
    refuses(
        ValueError,
        "FixedWidthHistogramObserver: width must be positive, got nan",
        fq.FixedWidthHistogramObserver,
        width=NAN,
    ),
    refuses(
        ValueError,
        "FixedWidthHistogramObserver: num_bins must be an integer",
        fq.FixedWidthHistogramObserver,
        num_bins=2.5,
    ),
]


@pytest.mark.parametrize(("error", "message", "call"), CASES)
def test_it_is_refused_by_name(error, message, call):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


@pytest.mark.parametrize("read_out", READ_OUTS)
def test_read_outs_take_histograms(read_out):
    name = read_out.__name__.replace("sqnr", "mse")  # which it is, with a weight
    with pytest.raises(TypeError, match=f"^{name}: histogram must be a Histogram, got tuple"):
        read_out((COUNTS, H.width))
    with pytest.raises(TypeError, match=f"^{name}: counts must be integers, got torch.float32"):
        read_out(H._replace(counts=COUNTS.float()))
    for wrong in (NO_BINS, fq.Histogram(COUNTS, torch.ones(2)), fq.Histogram(COUNTS[0], ONE)):
        with pytest.raises(ValueError, match=f"^{name}: counts must have the shape of width"):
            read_out(wrong)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_observers_take_floats_and_their_own_states(kind):
    observer, name = kind(), kind.__name__
    for wrong in (INTS, [1.0]):
        # The maximum is compute_amax's.
        with pytest.raises(TypeError, match=": x must be a floating-point tensor"):
            observer.update(observer.init(), wrong)
    state = observer.init()
    for call in (
        lambda: observer.update((1, 2), X),
        lambda: observer.merge(state, (1, 2)),
        lambda: observer.merge((1, 2), state),
        lambda: observer.amax((1, 2)),
    ):
        with pytest.raises(TypeError, match=rf"^{name}\.\w+: state must be a \w+State, got tuple"):
            call()
    with pytest.raises(ValueError, match=rf"^{name}\.\w+: state must have seen at least one value"):
        observer.amax(state)


@pytest.mark.parametrize("kind", [o for o in OBSERVERS if "Fixed" not in o.__name__])
def test_observers_name_a_change_of_shape(kind):
    observer, name = kind(axis=-1), kind.__name__
    state = observer.update(observer.init(), torch.ones(2, 3))
    for wrong in (torch.ones(2, 4), torch.ones(3)):
        with pytest.raises(ValueError, match=rf"^{name}\.\w+: amax must keep its shape"):
            observer.update(state, wrong)
    with pytest.raises(ValueError, match=r"axis must name different axes of a tensor of 2 axes"):
        dataclasses.replace(observer, axis=4).update(observer.init(), X)


def test_nan_and_nothing_are_no_errors():
    spec = fq.QuantSpec(8)
    assert bool(fq.compute_scale(ONE * NAN, spec).isnan())
    scale, zero_point = fq.compute_scale_zero_point(-ONE * NAN, ONE, spec)
    assert bool(scale.isnan())
    assert zero_point == 0
    assert bool(fq.fake_quantize(X, ONE * NAN).isnan().all())
    assert bool(fq.fake_tensor_quant(X, NAN).isnan().all())
    nothing = torch.ones(0, 3)
    assert fq.quantize(nothing, 1.0).q.shape == fq.fake_quantize(nothing, 1.0).shape == (0, 3)
    assert fq.tensor_quant(nothing, 1.0)[0].shape == fq.scaled_e4m3(nothing).shape == (0, 3)
    assert fq.compute_amax(nothing).item() == 0
    assert fq.compute_amax(nothing, 0).shape == (0, 1)
    assert fq.lsq_scale(nothing) == fq.lsq_plus_scale(nothing) == 1
    packed = fq.pack(fq.quantize(nothing, 1.0, spec=fq.QuantSpec(4)))
    assert fq.dequantize(packed).shape == (0, 3)
