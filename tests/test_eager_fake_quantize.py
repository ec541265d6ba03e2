"""The eager form of fake_quantize is the composite, bit for bit, with the same derivatives."""

import pytest
import torch

import fquant as fq
from fquant import eager_fake_quantize

SPECS = [fq.QuantSpec(), fq.QuantSpec(4, unsigned=True), fq.E4M3, fq.NF4]


@pytest.fixture
def composite(monkeypatch):
    """fake_quantize by plain tensor operations."""

    def call(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(eager_fake_quantize, "applies_to", lambda x, scale: False)
            return fq.fake_quantize(*args, **kwargs)

    return call


def inputs(dtype):
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)) * 60
    x[0, 0], x[1, 1], x[2, 2], x[3, 0] = torch.nan, torch.inf, -torch.inf, -0.0
    x[4] = torch.tensor([-128 * 0.5, 127 * 0.5, 0.25])
    return x.to(dtype)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bit_equal_values_and_gradients(composite, spec, dtype):
    scale = torch.tensor([0.5, 0.1, 2.0])
    results = []
    for function in (fq.fake_quantize, composite):
        x = inputs(dtype).requires_grad_()
        y = function(x, scale, spec=spec)
        y.nan_to_num(0.0).float().square().sum().backward()
        results.append((y.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        finite = ~b.isnan()
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a[finite].view(width), b[finite].view(width))  # zeros have one sign


@pytest.mark.parametrize("scale", [0.5, torch.full((1, 1), 0.5)])
@pytest.mark.parametrize("zero_point", [None, 3])
def test_long_tensors_go_in_parts(composite, zero_point, scale, monkeypatch):
    monkeypatch.setattr(eager_fake_quantize, "PART", 100)
    for x in (inputs(torch.float32), inputs(torch.float32).T, inputs(torch.float32)[:30]):
        results = []
        for function in (fq.fake_quantize, composite):
            leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            y = function(leaf, scale, zero_point)
            (y * torch.arange(x.numel()).view(x.shape)).nan_to_num(0.0).sum().backward()
            results.append((y.detach(), leaf.grad))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9))


def test_the_eager_form_is_used_where_it_may_be():
    x, scale = torch.ones(2, requires_grad=True), torch.tensor(0.5)
    assert "Eager" in type(fq.fake_quantize(x, scale).grad_fn).__name__
    assert "Eager" in type(fq.fake_quantize(torch.nn.Parameter(x), scale).grad_fn).__name__
    assert "Eager" not in type(fq.fake_quantize(x, scale.requires_grad_()).grad_fn).__name__


def test_forward_mode_and_double_backward_without_functorch():
    scale = torch.tensor(0.5)
    x, tangent = torch.tensor([0.3, 100.0]), torch.tensor([2.0, 3.0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        y = torch.autograd.forward_ad.unpack_dual(fq.fake_quantize(dual, scale))
        assert y.tangent.tolist() == [2, 0]
    leaf = x.clone().requires_grad_()
    loss = (fq.fake_quantize(leaf, scale) ** 3).sum()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), leaf)
    assert second.tolist() == [6 * 0.5, 0]


def test_a_constant_captured_by_a_transform():
    weight = torch.tensor([0.3, 0.6], requires_grad=True)

    def loss(x):
        return (x * fq.fake_quantize(weight, 0.5)).sum()

    assert torch.func.grad(loss)(torch.ones(2)).tolist() == [0.5, 0.5]
    assert torch.func.jvp(loss, (torch.ones(2),), (torch.ones(2),))[1].item() == 1
