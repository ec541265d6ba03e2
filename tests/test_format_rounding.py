"""Rounding to a grid: every mode by brute force, ties included; stochastic rounding."""

import bisect
import math
from fractions import Fraction

import pytest
import torch

import fquant as fq
from tests.format_cases import PRESETS, all_values, points_between

NAN, INF = float("nan"), float("inf")


by_name = pytest.mark.parametrize("spec", PRESETS.values(), ids=PRESETS.keys())


def nearest(x, grid, ties):
    """The nearest of an ascending list, in exact arithmetic on the two values to each side."""
    place = bisect.bisect(grid, x)
    near = grid[max(place - 2, 0) : place + 2]
    distances = [abs(Fraction(g) - Fraction(x)) for g in near]
    best = [g for g, d in zip(near, distances, strict=True) if d == min(distances)]
    return best[0] if len(best) == 1 else ties(best)


def even_code(spec):
    """Of values equally near, the one whose code is even; the smaller one if both are."""

    def choose(candidates):
        by_size = sorted(candidates, key=abs)
        codes = spec.encode(torch.tensor(by_size, dtype=torch.float64)).tolist()
        return next((v for v, c in zip(by_size, codes, strict=True) if c % 2 == 0), by_size[0])

    return choose


def away(candidates):
    return max(candidates, key=abs)


def up_from_powers(candidates):
    return away(candidates) if 0 not in candidates else 0.0


@by_name
def test_rounding_by_brute_force(spec):
    values = all_values(spec)[1]
    grid = values[values.isfinite() & (values <= spec.q_max) & (values >= spec.q_min)].unique()
    ties = {"half_even": even_code(spec), "half_away": away, "nearest": min}[spec.rounding]
    if getattr(spec, "man", None) == 0:
        ties = up_from_powers
    if not getattr(spec, "subnormals", True):
        grid = grid[(grid == 0) | (grid.abs() >= 2.0**spec.lowest_exponent)]
    x = points_between(grid)
    expected = [nearest(v, grid.tolist(), ties) for v in x.tolist()]
    assert spec.snap(x).tolist() == expected


DIRECTED = {
    "floor": lambda x, grid: max((g for g in grid if g <= x), default=grid[0]),
    "ceil": lambda x, grid: min((g for g in grid if g >= x), default=grid[-1]),
    "toward_zero": lambda x, grid: math.copysign(
        max(g for g in grid if 0 <= g <= max(abs(x), 0)), x
    ),
}


@pytest.mark.parametrize("rounding", DIRECTED)
@pytest.mark.parametrize("preset", ["E2M1", "E3M2", "E4M3"])
def test_directed_rounding_by_brute_force(preset, rounding):
    base = PRESETS[preset]
    spec = fq.FloatFormat(base.exp, base.man, finite=base.finite, rounding=rounding)
    grid = all_values(spec)[1]
    grid = grid[grid.isfinite()].unique()
    x = points_between(grid)
    assert spec.snap(x).tolist() == [DIRECTED[rounding](v, grid.tolist()) for v in x.tolist()]


@pytest.mark.parametrize("rounding", ["half_even", "half_away", "floor", "ceil", "toward_zero"])
def test_integers_round_by_the_same_modes(rounding):
    spec = fq.QuantSpec(3, rounding=rounding)
    x = torch.arange(-40, 40) / 8
    grid = list(range(-4, 4))
    by_name = {**DIRECTED, "half_away": lambda v, g: nearest(v, g, away)}
    by_name["half_even"] = lambda v, g: nearest(
        v, g, lambda c: next((k for k in c if k % 2 == 0), c[0])
    )
    expected = [by_name[rounding](v, grid) for v in x.tolist()]
    if rounding == "toward_zero":
        expected = [max(min(math.trunc(v), 3), -4) for v in x.tolist()]
    assert fq.quantize(x, 1.0, spec=spec).q.tolist() == expected


def test_half_away_is_exact_next_to_a_tie():
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0))
    assert fq.round_to_integer(below, "half_away").item() == 0
    big = torch.tensor(2.0**23 + 1)  # adding 0.5 here would round
    assert fq.round_to_integer(big, "half_away") == big


def test_stochastic_rounding_is_the_noise_given():
    spec = fq.QuantSpec(8, rounding="stochastic")
    x = torch.tensor([0.25, 0.25, -0.25, 3.0])
    noise = torch.tensor([0.2, 0.3, 0.8, 0.0])
    assert fq.quantize(x, 1.0, spec=spec, noise=noise).q.tolist() == [1, 0, -1, 3]
    assert fq.fake_quantize(x, 1.0, spec=spec, noise=noise).tolist() == [1, 0, -1, 3]
    batch = torch.func.vmap(lambda x, n: fq.fake_quantize(x, 1.0, spec=spec, noise=n))
    assert torch.equal(batch(x[:, None], noise[:, None])[:, 0], torch.tensor([1.0, 0, -1, 3]))


@pytest.mark.parametrize("spec", [fq.QuantSpec(4, rounding="stochastic"), None])
def test_stochastic_rounding_is_unbiased_and_seeded(spec):
    spec = spec or fq.FloatFormat(3, 2, finite="all", rounding="stochastic")
    x = torch.full((200_000,), 0.8)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return fq.fake_quantize(x, 0.5, spec=spec, generator=generator)

    state = torch.get_rng_state()
    y = draw(0)
    assert torch.equal(y, draw(0))
    assert not torch.equal(y, draw(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert y.unique().numel() == 2
    assert y.mean().item() == pytest.approx(0.8, abs=0.005)  # 0.25 / sqrt(2e5), 9 times
