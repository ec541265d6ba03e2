"""The strategies themselves: they reach the corners that the properties rely on."""

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from fquant.sparse import conv_map
from fquant.testing import strategies

# The first one found will do: to make it smaller takes most of the time.
FIRST = settings(phases=[Phase.generate], max_examples=2000)


@given(strategies.quant_cases())
def test_quant_cases_fit_their_grid(case):
    levels = case.x.double() / case.scale.double()
    assert bool((levels <= case.spec.q_max * (1 + 1e-6)).all())
    assert torch.broadcast_shapes(case.x.shape, case.scale.shape) == case.x.shape
    assert bool(case.x.isfinite().all())


@pytest.mark.parametrize(
    "wanted",
    [
        lambda c: c.x.numel() == 0,
        lambda c: c.x.ndim == 0,
        lambda c: c.x.ndim == 4,
        lambda c: c.scale.numel() > 1,
        lambda c: c.spec.unsigned and c.x.numel() > 1,
        lambda c: c.x.dtype == torch.bfloat16 and bool((c.x != 0).any()),
        lambda c: c.x.dtype == torch.float64,
        lambda c: c.spec.num_bits == 16,
        lambda c: c.x.numel() > 1 and bool((c.x == 0).all()),
    ],
)
def test_quant_cases_reach(wanted):
    find(strategies.quant_cases(), wanted, settings=FIRST)


@given(strategies.sparse_tensors())
def test_sparse_tensors_are_valid(x):
    type(x).create(x.features, x.coords, x.spatial_shape, x.batch_size)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda x: x.features.shape[0] == 0,
        lambda x: x.features.shape[0] == 1,
        lambda x: len(x.spatial_shape) == 4 and x.features.shape[0] > 2,
        lambda x: x.batch_size == 2 and len(x.coords) > 1 and int(x.coords[0, 0]) == 1,
        lambda x: x.coords.dtype == torch.int32,
    ],
)
def test_sparse_tensors_reach(wanted):
    find(strategies.sparse_tensors(), wanted, settings=FIRST)


@given(st.data())
def test_conv_geometries_fit(data):
    x = data.draw(strategies.sparse_tensors())
    geometry = data.draw(strategies.conv_geometries(x.spatial_shape))
    assert min(conv_map(x, *geometry).out_shape) >= 1
