"""The eager convolution and its derivatives of three orders against the composition's."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap

from fquant.sparse import SparseTensor, conv_map, eager_conv, sparse_conv, subm_map, transpose_map

G = torch.Generator().manual_seed(0)
CELLS = SparseTensor.from_dense((torch.rand(2, 1, 6, 6, generator=G) < 0.5).float())
MAPS = {
    "submanifold": subm_map(CELLS, 3),
    "strided": conv_map(CELLS, 3, 2, 1),
    "inverse": transpose_map(conv_map(CELLS, 2, 2)),
}


def derivatives(loss, f, w):
    """By both arguments, of order 1 to 3 by torch.func, and of order 1 and 2 by autograd."""
    first = grad(loss, argnums=(0, 1))

    def of_first(f, w):
        a, b = first(f, w)
        return a.sin().sum() + b.cos().sum()

    second = grad(of_first, argnums=(0, 1))
    third = grad(lambda f, w: sum(g.sin().sum() for g in second(f, w)), argnums=(0, 1))
    leaves = [f.clone().requires_grad_(), w.clone().requires_grad_()]
    once = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    twice = torch.autograd.grad(sum(g.square().sum() for g in once), leaves)
    found = [*first(f, w), *second(f, w), *third(f, w), *once, *twice]
    return [g.detach() for g in found]


def setting(name):
    kernel_map = MAPS[name]
    g = torch.Generator().manual_seed(1)
    f = torch.randn(kernel_map.in_coords.shape[0], 3, generator=g)
    w = torch.randn(4, *kernel_map.kernel_size, 3, generator=g)

    def loss(f, w):
        x = SparseTensor(f, kernel_map.in_coords, kernel_map.in_shape, kernel_map.batch_size)
        return sparse_conv(x, w, kernel_map=kernel_map).features.sin().sum()

    return loss, f, w


@pytest.mark.parametrize("name", list(MAPS))
def test_derivatives_are_those_of_the_composition(name, monkeypatch):
    loss, f, w = setting(name)
    assert eager_conv.applies_to(f, w)
    fast = derivatives(loss, f, w)
    monkeypatch.setattr(eager_conv, "applies_to", lambda *_: False)
    for actual, expected in zip(fast, derivatives(loss, f, w), strict=True):
        # float32 sums in another order, through up to three derivatives.
        size = expected.abs().max() if expected.numel() else 0.0
        assert torch.allclose(actual, expected, rtol=0, atol=1e-4 * float(size) + 1e-6)


def test_no_cells():
    kernel_map = subm_map(SparseTensor.from_dense(torch.zeros(1, 1, 3, 3)), 3)
    f, w = torch.zeros(0, 3, requires_grad=True), torch.ones(4, 3, 3, 3, requires_grad=True)
    x = SparseTensor(f, kernel_map.in_coords, kernel_map.in_shape, kernel_map.batch_size)
    y = sparse_conv(x, w, kernel_map=kernel_map).features
    assert y.shape == (0, 4)
    once = torch.autograd.grad(y.sum(), [f, w], create_graph=True)
    assert [g.shape for g in once] == [f.shape, w.shape]
    assert not once[1].any()


def test_other_transforms_take_the_composition(monkeypatch):
    loss, f, w = setting("submanifold")

    def refuse(*_):
        raise AssertionError("eager_conv under a transform that it does not serve")

    monkeypatch.setattr(eager_conv, "eager_conv", refuse)
    vmap(lambda f: loss(f, w))(f.expand(2, -1, -1))
    vmap(grad(loss), in_dims=(0, None))(f.expand(2, -1, -1), w)
    jvp(lambda f: loss(f, w), (f,), (f,))
    hessian(loss)(f, w)
    with forward_ad.dual_level():
        loss(forward_ad.make_dual(f, f), w)
    torch.compile(loss, fullgraph=True, backend="aot_eager")(f, w)
    torch.compile(grad(loss), fullgraph=True, backend="aot_eager")(f, w)
    loss(f.double(), w.double())
    with pytest.raises(AssertionError, match="does not serve"):
        grad(loss)(f, w)


def test_the_graph_of_backward_holds_no_gathered_table():
    x = SparseTensor.from_dense(torch.ones(1, 1, 30, 30))
    kernel_map = subm_map(x, 3)
    f = torch.randn(900, 16, requires_grad=True)
    w = torch.randn(16, 3, 3, 16, requires_grad=True)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        sparse_conv(x.with_features(f), w, kernel_map=kernel_map)
    assert 0 < max(sizes) <= 900 * 16  # the gathered features would be nine times as many
