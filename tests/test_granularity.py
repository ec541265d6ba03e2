"""Granularity: groups and blocks along any axis."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fquant as fq


@given(st.sampled_from([(0, 2), ((0, 1), (1, 3)), ((1, 0), (3, 2)), ((0, 1), 1), (1, 6), (-1, 2)]))
def test_blocks_are_their_elements_alone(granularity):
    axis, block = granularity
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    amax = fq.compute_amax(x, axis, block)
    axes = (axis,) if isinstance(axis, int) else axis
    sizes = dict(
        zip((a % 2 for a in axes), (block,) * 2 if isinstance(block, int) else block, strict=False)
    )
    steps = [sizes.get(a, x.shape[a]) for a in range(2)]
    assert amax.shape == (4 // steps[0], 6 // steps[1])
    scale = fq.compute_scale(amax)
    fake = fq.fake_quantize(x, scale)
    assert torch.equal(fq.dequantize(fq.quantize(x, scale)), fake)
    for i in range(amax.shape[0]):
        for j in range(amax.shape[1]):
            part = (
                slice(i * steps[0], (i + 1) * steps[0]),
                slice(j * steps[1], (j + 1) * steps[1]),
            )
            assert amax[i, j] == x[part].abs().max()
            assert torch.equal(fake[part], fq.fake_quantize(x[part], scale[i, j]))


def test_per_token_is_the_axes_before_the_last():
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    amax = fq.compute_amax(x, (0, 1))
    assert torch.equal(amax[..., 0], x.abs().amax(-1))


def test_zero_points_come_in_blocks_too():
    x = torch.tensor([0.0, 1.0, 4.0, 6.0])
    scale, zero_point = torch.tensor([0.5, 1.0]), torch.tensor([-3, 4])
    q = fq.quantize(x, scale, zero_point)
    assert q.q.tolist() == [-3, -1, 8, 10]
    assert fq.dequantize(q).tolist() == x.tolist()
    assert fq.fake_quantize(x, scale, zero_point).tolist() == x.tolist()
    assert fq.quantize(x * torch.nan, scale, zero_point).q.tolist() == [-3, -3, 4, 4]


def test_gradient_of_a_block_scale():
    x = torch.tensor([9.0, 0.1, -9.0, 200.0])
    gradient = torch.func.grad(lambda s: fq.fake_quantize(x, s).sum())(torch.tensor([0.01, 1.0]))
    assert gradient.tolist() == [127, 127]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fq.compute_amax(torch.ones(4), 0, 3),
            ValueError,
            "block must divide axis 0 of size 4",
        ),
        (lambda: fq.compute_amax(torch.ones(4), 0, (1, 2)), ValueError, "one size per kept axis"),
        (lambda: fq.compute_amax(torch.ones(4), None, 2), ValueError, "block must be None without"),
        (
            lambda: fq.fake_quantize(torch.ones(4, 4), torch.ones(3, 1)),
            ValueError,
            "scale must have",
        ),
        (lambda: fq.fake_quantize(torch.ones(4, 4), torch.ones(2)), ValueError, "scale must have"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
