"""Voxelization against a dictionary of cells, point by point."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fquant.sparse import VoxelLimitWarning, from_points, subm_map


@given(st.data())
def test_cells_are_what_a_dictionary_finds(data):
    axes = data.draw(st.integers(1, 4))
    count = data.draw(st.integers(0, 30))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    # Multiples of 1/8: positions and cell borders are exact.
    points = torch.randint(-20, 40, (count, axes), generator=g).double() / 8
    features = torch.randint(-9, 10, (count, 2), generator=g).double()
    batch = torch.randint(0, 2, (count,), generator=g)
    reduce = data.draw(st.sampled_from(["mean", "max", "first"]))
    lower, upper, size = [-1.0] * axes, [2.0] * axes, 0.75
    cells, row = from_points(
        points, features, size, lower, upper, batch=batch, batch_size=2, reduce=reduce
    )
    found = {}
    for i, point in enumerate(points.tolist()):
        if all(-1.0 <= p < 2.0 for p in point):
            key = (int(batch[i]), *(math.floor((p + 1.0) / size) for p in point))
            found.setdefault(key, []).append(i)
    assert [tuple(c) for c in cells.coords.tolist()] == sorted(found)
    assert cells.spatial_shape == (4,) * axes
    for j, key in enumerate(sorted(found)):
        members = features[found[key]]
        expected = {"mean": members.mean(0), "max": members.amax(0), "first": members[0]}[reduce]
        assert torch.equal(cells.features[j], expected)
        assert row[found[key]].tolist() == [j] * len(found[key])
    assert int((row < 0).sum()) == count - sum(map(len, found.values()))
    subm_map(cells, 3)  # valid coordinates


@given(st.data())
def test_the_limits_keep_what_comes_first(data):
    count, per_cell, per_sample = (
        data.draw(st.integers(a, b)) for a, b in ((0, 30), (1, 3), (1, 6))
    )
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    points = torch.randint(-1, 4, (count, 2), generator=g).double()
    features = torch.randint(-9, 10, (count, 1), generator=g).double()
    batch = torch.randint(0, 2, (count,), generator=g)
    found = {}
    for i, point in enumerate(points.tolist()):
        if all(0 <= p < 3 for p in point):
            found.setdefault((int(batch[i]), *map(int, point)), []).append(i)
    order = list(found)  # by first point
    kept = {k for k in order if [o for o in order if o[0] == k[0]].index(k) < per_sample}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cells, row = from_points(
            points, features, 1.0, [0, 0], [3, 3], batch=batch, batch_size=2,
            max_points=per_cell, max_voxels=per_sample,
        )  # fmt: skip
    assert [tuple(c) for c in cells.coords.tolist()] == sorted(kept)
    for j, key in enumerate(sorted(kept)):
        assert torch.equal(cells.features[j], features[found[key][:per_cell]].mean(0))
        assert row[found[key]].tolist() == [j] * len(found[key])
    over = [i for key in order if key not in kept for i in found[key]]
    assert (row == -2).nonzero().flatten().tolist() == sorted(over)
    assert [w.category for w in caught] == ([VoxelLimitWarning] if over else [])
    if over:
        text = f"leaves out {len(order) - len(kept)} of {len(order)} voxels with {len(over)} points"
        assert text in str(caught[0].message)


def test_points_that_are_not_finite_are_left_out():
    points = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [0.5]])
    cells, row = from_points(points, torch.ones(4, 1), 1.0, [0.0], [2.0])
    assert row.tolist() == [-1, -1, -1, 0]
    assert cells.features.tolist() == [[1.0]]


def test_points_just_below_the_end_stay_in_the_grid():
    lower, upper, size = -0.3, -0.09999999999999998, 0.2  # of one cell
    point = math.nextafter(upper, lower)
    assert math.floor((point - lower) / size) == 1  # in floating point
    end = torch.tensor([[point]], dtype=torch.float64)
    cells, _ = from_points(end, torch.ones(1, 1), size, [lower], [upper])
    assert cells.spatial_shape == (1,)
    assert cells.coords.tolist() == [[0, 0]]


def test_differentiable():
    points = torch.tensor([[0.1], [0.2], [1.5]])
    gradient = torch.func.grad(
        lambda f: (from_points(points, f, 1.0, [0], [2])[0].features ** 2).sum()
    )(torch.tensor([[1.0], [3.0], [5.0]]))
    assert gradient.flatten().tolist() == [2.0, 2.0, 10.0]


P, F = torch.zeros(2, 3), torch.ones(2, 1)
RANGE = ([0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: from_points(P.int(), F, 1.0, *RANGE), TypeError, "points must be a floating"),
        (lambda: from_points(P, F.int(), 1.0, *RANGE), TypeError, "features must be a floating"),
        (
            lambda: from_points(P[:, :2], F, 1.0, *RANGE),
            ValueError,
            r"points must have shape \(P, 3\)",
        ),
        (lambda: from_points(P, F[:1], 1.0, *RANGE), ValueError, "P = 2 like points"),
        (lambda: from_points(P, F, 0.0, *RANGE), ValueError, "sizes positive"),
        (lambda: from_points(P, F, 1.0, [0.0] * 3, [0.0] * 3), ValueError, r"grid of \(0, 0, 0\)"),
        (lambda: from_points(P, F, 1e-9, [0.0] * 3, [1e9] * 3), ValueError, "the range must hold"),
        (lambda: from_points(P, F, 1.0, *RANGE, max_voxels=0), ValueError, "max_voxels must be at"),
        (lambda: from_points(P, F, 1.0, *RANGE, max_points=0), ValueError, "max_points must be at"),
        (lambda: from_points(P, F, 1.0, *RANGE, reduce="sum"), ValueError, "one of .*got 'sum'"),
        (
            lambda: from_points(P, F, 1.0, *RANGE, batch=torch.tensor([0, 1])),
            ValueError,
            r"batch must be in \[0, 1\), got 0 to 1",
        ),
        (
            lambda: from_points(P, F, 1.0, *RANGE, batch=P[:, 0]),
            ValueError,
            "batch must be integers",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
