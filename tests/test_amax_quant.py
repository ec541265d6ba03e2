"""tensor_quant and its relatives against pytorch-quantization's documented behaviour.

Golden values: its user guide ("Basic Functionalities") and a run of its CPU code, version 2.2.1.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fquant as fq
from fquant.testing import strategies

HALF_AND_FULL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_documented_example():
    torch.manual_seed(12345)
    x = torch.rand(10)
    integers, scale = fq.tensor_quant(x, x.abs().max())
    assert integers.tolist() == [126, 113, 127, 59, 11, 23, 47, 73, 43, 27]
    assert f"{scale.item():.4f}" == "128.0057"
    fake = fq.fake_tensor_quant(x, x.abs().max())
    printed = "0.9843 0.8828 0.9921 0.4609 0.0859 0.1797 0.3672 0.5703 0.3359 0.2109"
    assert " ".join(f"{v:.4f}" for v in fake.tolist()) == printed


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_amax_zero_gives_zeros_and_scale_one(dtype):
    integers, scale = fq.tensor_quant(torch.tensor([0.0, -3.0, 5.0], dtype=dtype), 0.0)
    assert integers.tolist() == [0, 0, 0]
    assert scale.item() == 1
    fake = fq.fake_tensor_quant(torch.tensor([float("nan"), float("inf")], dtype=dtype), 0.0)
    assert bool(fake.isnan().all())


def test_amax_at_the_smallest_half_counts_as_zero():
    x = torch.tensor([2.0**-24])
    assert fq.fake_tensor_quant(x, 2.0**-24).item() == 0
    assert fq.fake_tensor_quant(x, 2.0**-23).item() == pytest.approx(2.0**-24, rel=0.02)


def test_amax_nan_gives_nan():
    assert bool(fq.fake_tensor_quant(torch.tensor([1.0, 0.0]), float("nan")).isnan().all())


def test_infinities_saturate_and_nan_stays():
    x = torch.tensor([float("inf"), float("-inf"), float("nan")])
    fake = fq.fake_tensor_quant(x, 1.5)
    assert fake[:2].tolist() == [1.5, -1.5]
    assert bool(fake[2].isnan())


def test_ties_go_to_even():
    integers, _ = fq.tensor_quant(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), 127.0)
    assert integers.tolist() == [0, 2, 2, 0, -2]


def test_two_bits_narrow_has_three_levels():
    integers, _ = fq.tensor_quant(torch.linspace(-1, 1, 9), 1.0, 2)
    assert set(integers.tolist()) == {-1, 0, 1}


def test_full_range_reaches_the_lowest_code():
    integers, _ = fq.tensor_quant(torch.tensor([-128.0, 127.0]), 127.0, narrow_range=False)
    assert integers.tolist() == [-128, 127]


def test_unsigned_has_one_more_bit():
    integers, scale = fq.tensor_quant(torch.tensor([0.5, 1.0]), 1.0, unsigned=True)
    assert integers.tolist() == [128, 255]
    assert scale.item() == 255


def test_output_dtype():
    integers, _ = fq.tensor_quant(torch.tensor([0.5, -1.0]), 1.0, output_dtype=torch.int8)
    assert integers.dtype == torch.int8
    assert integers.tolist() == [64, -127]


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_gradient_mask_includes_the_edge(dtype):
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=dtype, requires_grad=True)
    for function in (fq.fake_tensor_quant, lambda x, amax: fq.tensor_quant(x, amax)[0]):
        (gradient,) = torch.autograd.grad(function(x, 1.0).sum(), x)
        assert gradient.tolist() == [0, 1, 1, 1, 0]


def test_affine_represents_zero_when_the_range_holds_it():
    x = torch.tensor([0.0, -0.3, 1.0])
    assert fq.fake_affine_tensor_quant(x, -0.3, 1.0)[0].item() == 0


@pytest.mark.parametrize("amax_shape", [(), (1, 1), (4, 1), (1, 3), (4, 3)])
def test_amax_of_any_broadcastable_shape(amax_shape):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    amax = torch.rand(amax_shape, generator=torch.Generator().manual_seed(2)) + 0.5
    by_element = torch.stack(
        [
            fq.fake_tensor_quant(v, a)
            for v, a in zip(x.flatten(), amax.expand(4, 3).flatten(), strict=True)
        ]
    )
    assert torch.equal(fq.fake_tensor_quant(x, amax), by_element.view(4, 3))


@given(strategies.float_tensors(), st.integers(2, 16), st.booleans())
def test_fake_is_integers_divided_by_scale(x, num_bits, narrow_range):
    amax = fq.compute_amax(x)
    wide = x if x.dtype == torch.float64 else x.float()
    integers, scale = fq.tensor_quant(wide, amax, num_bits, narrow_range=narrow_range)
    fake = fq.fake_tensor_quant(x, amax, num_bits, narrow_range=narrow_range)
    assert fake.dtype == x.dtype
    assert torch.equal(fake, (integers / scale).to(x.dtype))


@given(strategies.float_tensors(dtypes=(torch.float32, torch.float64)), st.integers(2, 16))
def test_amax_form_and_step_form_differ_by_one_step_at_most(x, num_bits):
    spec = fq.QuantSpec(num_bits, narrow_range=True)
    amax = fq.compute_amax(x)
    scale = fq.compute_scale(amax, spec)
    if amax <= 2.0**-24:
        return
    difference = fq.tensor_quant(x, amax, num_bits)[0] - fq.quantize(x, scale, spec=spec).q
    assert difference.abs().max() <= 1 if x.numel() else True


@pytest.mark.peer
def test_against_torch_fake_quantize():
    """torch multiplies by 1 / scale: equal but for values next to a tie."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    scale = fq.compute_scale(fq.compute_amax(x))
    theirs = torch.fake_quantize_per_tensor_affine(x, scale.item(), 0, -128, 127)
    ours = fq.fake_quantize(x, scale)
    assert (ours != theirs).sum() <= 10
    assert (ours - theirs).abs().max() <= scale * 1.0001


BAD_CALLS = [
    (lambda: fq.tensor_quant([1.0], 1.0), TypeError, "tensor_quant: inputs must be a floating"),
    (lambda: fq.tensor_quant(torch.ones(2, dtype=torch.int8), 1.0), TypeError, "torch.int8"),
    (lambda: fq.fake_tensor_quant(torch.ones(2), "1"), TypeError, "amax must be a number"),
    (lambda: fq.fake_tensor_quant(torch.ones(2), -1.0), ValueError, "amax must not be negative"),
    (lambda: fq.fake_tensor_quant(torch.ones(2), torch.ones(3)), ValueError, r"broadcasts.*\(3,\)"),
    (lambda: fq.fake_tensor_quant(torch.ones(2), torch.ones(2, 1)), ValueError, "broadcasts"),
    (
        lambda: fq.fake_tensor_quant(torch.ones(2), torch.ones(2, device="meta")),
        ValueError,
        "must be on cpu",
    ),
    (lambda: fq.tensor_quant(-torch.ones(2), 1.0, unsigned=True), ValueError, "inputs must not be"),
    *[
        (lambda b=b: fq.tensor_quant(torch.ones(2), 1.0, b), ValueError, f"num_bits.*got {b}")
        for b in (0, 1, 25, True, 8.0)
    ],
    (lambda: fq.fake_affine_tensor_quant(torch.ones(2), 1.0, -1.0), ValueError, "min_range"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
