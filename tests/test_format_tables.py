"""Published tables of formats that need no test file of their own; what compiled code keeps."""

import dataclasses
import math

import pytest
import torch

import fquant as fq


def half_grid(num_bits):
    """AQT's grid without zero: 2^b levels at the halves."""
    top = 2 ** (num_bits - 1)
    return fq.Codebook(tuple(i + 0.5 for i in range(-top, top)))


# quantization.md 3.2, AQT's IntSymmetric: where amax lands, for 8, 2 and 1 bits.
@pytest.mark.parametrize(("bits", "edge"), [(8, 128.0), (2, 2.0), (1, 1.0)])
@pytest.mark.parametrize("keeps_max", [False, True])
def test_aqt_grids_without_zero(bits, edge, keeps_max):
    spec = half_grid(bits)
    assert spec.num_bits == bits
    assert spec.q_max == edge - 0.5
    amax = torch.tensor(3.0)
    scale = fq.compute_scale(amax, spec) if keeps_max else amax / edge
    assert (amax / scale).item() == pytest.approx(edge - 0.5 * keeps_max, rel=1e-6)
    x = torch.linspace(-3.3, 3.3, 998)  # no tie, which a codebook gives to the lower value
    expected = ((x / scale).floor() + 0.5).clamp(0.5 - edge, edge - 0.5) * scale
    assert torch.equal(fq.fake_quantize(x, scale, spec=spec), expected)
    if keeps_max:
        assert fq.fake_quantize(amax - 1e-4, scale, spec=spec).item() == pytest.approx(3.0)


def test_aqt_one_bit_grid_with_zero_is_refused():
    # preserve_zero and preserve_max_val: the bound is 0, a grid of zero alone.
    with pytest.raises(ValueError, match="num_bits must be an integer from 2 to 16, got 1"):
        fq.QuantSpec(1, narrow_range=True)


# quantization.md 3.1, Qwix's symmetric bounds besides those of AQT.
def test_qwix_bounds():
    one = torch.tensor(1.0)
    assert fq.compute_scale(one, fq.QuantSpec(16), "full").item() == 1 / 32768
    for bits in range(2, 8):
        step = fq.compute_scale(one, fq.QuantSpec(bits), "edge")
        assert step == torch.tensor(1.0) / (2.0 ** (bits - 1) - 0.5)
    for spec, bound in ((fq.E4M3, 448.0), (fq.E5M2, 57344.0), (fq.NF4, 1.0)):
        assert fq.compute_scale(one, spec) == torch.tensor(1.0) / bound


# quantization.md 5.1, pytorch-quantization's pre_quant_scale: a product before the quantizer.
@pytest.mark.parametrize(
    ("factor", "expected"),
    [(1.0, [0, 0, 1, 2]), (2.0, [0, 1, 2, 4]), ([1.0, 2.0, 3.0, 4.0], [0, 1, 3, 8])],
)
def test_pre_quant_scale(factor, expected):
    x = torch.tensor([0.0, 0.4, 1.1, 2.0]) * torch.tensor(factor)
    assert fq.fake_tensor_quant(x, 127.0).tolist() == expected
    assert fq.fake_quantize(x, 1.0).tolist() == expected


def test_scales_of_parameters_come_in_blocks():
    spec = dataclasses.replace(fq.E2M1, axis=-1, block=2, scale_rule="power_of_two_floor")
    weight = torch.tensor([1.0, 3.0, 20.0, -48.0])
    scale = fq.param_scales({"w": weight}, {"w": spec})["w"]
    assert scale.tolist() == [0.5, 8.0]
    assert fq.fake_quant_params({"w": weight}, {"w": spec})["w"].tolist() == [1, 3, 16, -48]


def test_inductor_gradients_equal_eager_and_keep_a_byte_per_value():
    """Half types too: both compute in float32 and round the result once."""
    base = torch.cat([torch.arange(-700, 700) / 8, torch.randn(2600) * 40])
    base[0], base[1], base[2] = math.nan, math.inf, -math.inf
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def fake(a, b, c, scale):
        grids = ((a, fq.QuantSpec()), (b, fq.E4M3), (c, fq.QuantSpec(4, rounding="half_away")))
        return [fq.fake_quantize(x, scale, spec=spec) for x, spec in grids]

    def run(function):
        leaves = [base.to(dtype, copy=True).requires_grad_() for dtype in dtypes]
        scale = torch.tensor(0.37)
        values = function(*leaves, scale)
        kept = values[0].grad_fn.saved_tensors
        loss = sum((y.nan_to_num(0.0).float() * torch.arange(4000)).sum() for y in values)
        return values, torch.autograd.grad(loss, leaves), kept

    torch._dynamo.reset()
    compiled = torch.compile(fake, fullgraph=True)
    values, gradients, kept = run(compiled)
    expected_values, expected_gradients, _ = run(fake)
    for actual, expected in zip(values, expected_values, strict=True):
        assert torch.equal(actual.nan_to_num(9e4), expected.nan_to_num(9e4))
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(actual, expected)
    assert {t.dtype for t in kept if t.numel() > 1} == {torch.uint8}


def test_forward_mode_of_a_compiled_function():
    x, tangent = torch.tensor([0.3, 100.0, -100.0]), torch.tensor([2.0, 3.0, 5.0])
    scale = torch.tensor(0.5)

    def derivative(x, scale):
        inputs, tangents = (x, scale), (tangent, torch.tensor(1.0))
        return torch.func.jvp(fq.fake_quantize, inputs, tangents)[1]

    torch._dynamo.reset()
    compiled = torch.compile(derivative, fullgraph=True, backend="aot_eager")
    assert derivative(x, scale).tolist() == [2, 127, -128]
    assert compiled(x, scale).tolist() == [2, 127, -128]
