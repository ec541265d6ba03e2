"""Formats, blocks, learned ranges and calibration under every transform."""

import dataclasses

import numpy as np
import pytest
import torch

import fquant as fq
from fquant.testing.transforms import TransformCase, transform_matrix
from tests.oracles import clip

X = torch.tensor([[-2.5, -2.0, -0.7, 0.0], [0.0078125, 0.31, 1.9999, 7.0]])
SCALE = torch.tensor([[0.03], [0.011]])
NOISE = torch.tensor([[0.1, 0.9, 0.4, 0.6], [0.3, 0.7, 0.2, 0.8]])
STOCHASTIC = fq.QuantSpec(6, rounding="stochastic")
MX = dataclasses.replace(fq.E2M1, axis=(0, 1), block=(1, 2), scale_rule="power_of_two_floor")
NVFP4 = dataclasses.replace(fq.NVFP4, axis=(0, 1), block=(1, 2))


def nearest_in(levels):
    """Values by search among all of a grid's levels; the arguments below are not on a tie."""
    levels = torch.cat([-levels.flip(0), levels]).float()

    def value(x, scale):
        units = (x / scale).clamp(levels.min(), levels.max())
        return levels[(units.unsqueeze(-1) - levels).abs().argmin(-1)] * scale

    return value


def float_case(name, spec):
    return TransformCase(
        name,
        lambda x, scale: fq.fake_quantize(x, scale, spec=spec),
        nearest_in(spec.levels()),
        lambda x, scale: clip(x, -spec.q_max * scale, spec.q_max * scale),
        (X + 0.001, SCALE),
    )


def blocks_of_two(function):
    """A function of (pairs, amax of each pair, kept dimensions)."""

    def value(x):
        pairs = x.reshape(2, 2, 2)
        return function(pairs, pairs.abs().amax(-1, keepdim=True)).reshape(2, 4)

    return value


def mx_value(pairs, amax):
    scale = torch.from_numpy(np.exp2(np.floor(np.log2(amax.numpy())) - 2))
    return nearest_in(fq.E2M1.levels())(pairs, scale)


def mx_slope(pairs, amax):
    limit = torch.from_numpy(np.exp2(np.floor(np.log2(amax.detach().numpy())) - 2)) * 6
    return clip(pairs, -limit, limit)


def lsq_slope(x, scale, offset):
    v = (x - offset) / scale
    v = clip(v, torch.tensor(-4.0), torch.tensor(3.0))
    rounded = v.detach().round() + (v - v.detach())
    return rounded * scale + offset


def pact_value(x, alpha):
    step = alpha / 15
    return (x / step).round().clamp(0, 15) * step


def closed_clip(x, low, high):
    """Clip whose derivative at an edge is that of the end."""
    return torch.where(x <= low, low, torch.where(x >= high, high, x))


def both_slope(x):
    y = clip(x, torch.tensor(-448.0), torch.tensor(448.0)) * 1.0
    if y.requires_grad:
        y.register_hook(lambda g: g.detach().to(torch.float8_e5m2).float() + (g - g.detach()))
    return y


def range_of(x):
    return float(2.0 ** (np.floor(np.log2(np.abs(x).max())) + 1))


def numpy_histogram(x):
    return np.histogram(np.abs(x), bins=16, range=(0.0, range_of(x)))[0].astype(np.float32)


HISTOGRAM = fq.HistogramObserver(num_bins=16, percentile=100)
CASES = [
    float_case("fake_quantize_e4m3", fq.E4M3),
    float_case("fake_quantize_e2m1", fq.E2M1),
    float_case("fake_quantize_bf16", fq.FloatFormat(5, 2, finite="fnuz", bias=16)),
    TransformCase(
        "fake_quantize_nf4",
        lambda x, scale: fq.fake_quantize(x, scale, spec=fq.NF4),
        lambda x, scale: (
            (v := torch.tensor(fq.NF4.values))[((x / scale).unsqueeze(-1) - v).abs().argmin(-1)]
            * scale
        ),
        lambda x, scale: clip(x, -scale, scale),
        (X + 0.001, SCALE * 50),
    ),
    TransformCase(
        "quantize_e5m2",
        lambda x, scale: fq.quantize(x, scale, spec=fq.E5M2).q,
        lambda x, scale: (x / scale).to(torch.float8_e5m2).view(torch.uint8),
        None,
        (X, SCALE),
    ),
    TransformCase(
        "dequantize_e5m2",
        lambda scale: fq.dequantize(
            fq.QTensor(torch.tensor([[60], [193]], dtype=torch.uint8), scale, spec=fq.E5M2)
        ),
        lambda scale: torch.tensor([[1.0], [-2.5]]) * scale,
        lambda scale: torch.tensor([[1.0], [-2.5]]) * scale,
        (SCALE,),
    ),
    TransformCase(
        "packed",
        lambda x, scale: fq.dequantize(fq.pack(fq.quantize(x, scale, spec=fq.QuantSpec(3)))),
        lambda x, scale: (x / scale).round().clamp(-4, 3) * scale,
        None,
        (X, SCALE),
    ),
    TransformCase(
        "stochastic",
        lambda x, scale: fq.fake_quantize(x, scale, spec=STOCHASTIC, noise=NOISE),
        lambda x, scale: (
            ((x / scale).floor() + (x / scale - (x / scale).floor() > NOISE)).clamp(-32, 31) * scale
        ),
        lambda x, scale: clip(x, -32 * scale, 31 * scale),
        (X, SCALE),
    ),
    TransformCase(
        "block_scale",
        lambda x, scale: fq.fake_quantize(x, scale, spec=fq.QuantSpec(6)),
        lambda x, scale: (x / (s := scale.repeat_interleave(2, 1))).round().clamp(-32, 31) * s,
        lambda x, scale: clip(
            x, -32 * scale.repeat_interleave(2, 1), 31 * scale.repeat_interleave(2, 1)
        ),
        (X, torch.tensor([[0.03, 0.02], [0.011, 0.3]])),
    ),
    TransformCase(
        "mx",
        lambda x: fq.fake_quantize(
            x, fq.compute_scale(fq.compute_amax(x, MX.axis, MX.block), MX), spec=MX
        ),
        blocks_of_two(mx_value),
        blocks_of_two(mx_slope),
        (X + 0.001,),
    ),
    TransformCase(
        "nvfp4_scale",
        lambda x: fq.compute_scale(fq.compute_amax(x, NVFP4.axis, NVFP4.block), NVFP4),
        lambda x: (
            (a := x.reshape(2, 2, 2).abs().amax(-1)) * 0
            + (a / 6 / (t := a.max() / 2688)).to(torch.float8_e4m3fn).float() * t
        ),
        lambda x: 0.0 * x[:, ::2],
        (X,),
    ),
    TransformCase(
        "scaled_e4m3",
        fq.scaled_e4m3,
        lambda x, amax: (
            (x * (448 / amax)).clamp(-448, 448).to(torch.float8_e4m3fn).float() / (448 / amax)
        ),
        lambda x, amax: clip(x, -amax, amax),
        (X, torch.tensor([[2.0], [1.5]])),
        atol=1e-6,  # torch divides a number by a tensor by way of a reciprocal
    ),
    TransformCase(
        "fake_quantize_lsq",
        lambda x, scale, offset: fq.fake_quantize_lsq(
            x, scale, offset, fq.QuantSpec(3), gradient_scale=1.0
        ),
        lambda x, scale, offset: ((x - offset) / scale).round().clamp(-4, 3) * scale + offset,
        lsq_slope,
        (X, torch.tensor([[0.4], [0.7]]), torch.tensor(0.1)),
        atol=1e-5,  # products of a few numbers of size 10, in another order
    ),
    TransformCase(
        "learned_clip",
        fq.learned_clip,
        closed_clip,
        closed_clip,
        (X, torch.tensor(-2.0), torch.tensor([[0.5], [1.5]])),
    ),
    TransformCase(
        "fake_quantize_pact",
        lambda x, alpha: fq.fake_quantize_pact(x, alpha, 4),
        pact_value,
        lambda x, alpha: closed_clip(x, torch.tensor(0.0), alpha),
        (X, torch.tensor([[0.31], [1.5]])),
    ),
    TransformCase(
        "fake_quantize_both",
        lambda x: fq.fake_quantize_both(x, 1.0, gradient_scale=1.0),
        lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn).float(),
        both_slope,
        (torch.tensor([[0.3, 500.0], [-0.11, 1.0]]),),
    ),
    TransformCase(
        "histogram",
        lambda x: HISTOGRAM.update(HISTOGRAM.init(), x).counts.float(),
        lambda x: torch.from_numpy(numpy_histogram(x.numpy())),
        None,
        (X,),
    ),
    TransformCase(
        "percentile_amax",
        lambda x: HISTOGRAM.amax(HISTOGRAM.update(HISTOGRAM.init(), x)),
        lambda x: (x.abs().max() / (w := range_of(x.numpy()) / 16)).floor() * w,
        None,
        (X,),
    ),
]


@pytest.mark.parametrize(("case", "check"), transform_matrix(CASES))
def test_transform_matrix(case, check):
    check(case)


INDUCTOR_SPECS = {
    "E4M3": fq.E4M3,
    "BF16": fq.BF16,
    "NF4": fq.NF4,
    "half away": fq.QuantSpec(5, rounding="half_away"),
    "stochastic": STOCHASTIC,
    "MX": MX,
}


# Half types differ in their conversion to float32 alone, which all specs share.
@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (torch.float32, list(INDUCTOR_SPECS)),
        (torch.bfloat16, ["E4M3", "NF4", "stochastic"]),
        (torch.float16, ["BF16", "half away", "MX"]),
    ],
)
def test_inductor_equals_eager_bit_for_bit(dtype, names):
    x = torch.cat([torch.arange(-600, 600) / 8, torch.randn(4000) * 30]).to(dtype).view(-1, 2)
    x[0, 0] = torch.nan
    uniform = torch.rand(x.shape)

    def results(x, spec):
        noise = uniform if spec.rounding == "stochastic" else None
        scale = fq.compute_scale(fq.compute_amax(x[1:], spec.axis, spec.block), spec)
        q = fq.quantize(x[1:], scale, spec=spec, noise=None if noise is None else noise[1:])
        fixed = fq.fake_quantize(x, 1.1, spec=spec, noise=noise)
        return scale, q.q, fq.dequantize(q), fixed

    def all_specs(x):
        return {name: results(x, INDUCTOR_SPECS[name]) for name in names}

    torch._dynamo.reset()
    compiled = torch.compile(all_specs, fullgraph=True)(x)  # in one graph: the compiler starts once
    for name, eager in all_specs(x).items():
        for actual, expected in zip(compiled[name], eager, strict=True):
            assert torch.equal(actual.nan_to_num(1e30), expected.nan_to_num(1e30)), name


def test_inductor_histogram_equals_eager():
    observer = fq.HistogramObserver(axis=0)
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * 7
    state = observer.update(observer.init(), x[:, :2000])
    torch._dynamo.reset()
    compiled = torch.compile(observer.update, fullgraph=True)(state, x)
    for actual, expected in zip(compiled, observer.update(state, x), strict=True):
        assert torch.equal(actual, expected)
