"""Cells picked and found by brute force; a decoder that makes cells and drops them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fquant as fq
from fquant.sparse import (
    SparseTensor,
    find_cells,
    nn,
    prune,
    sparse_conv_transpose,
    subm_conv,
)
from fquant.testing import strategies


@given(st.data())
def test_what_is_kept_is_what_was_said(data):
    x = data.draw(strategies.sparse_tensors())
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(x.coords),
                                           max_size=len(x.coords))), dtype=torch.bool)  # fmt: skip
    y = prune(x, kept)
    chosen = [i for i in range(len(kept)) if kept[i]]
    assert y.coords.tolist() == [x.coords.tolist()[i] for i in chosen]
    assert torch.equal(y.features, x.features[chosen])
    rows = find_cells(x, y).tolist()
    assert rows == [chosen.index(i) if i in chosen else -1 for i in range(len(kept))]
    q = prune(fq.quantize(x.map(torch.Tensor.float), 0.5), kept)
    assert torch.equal(fq.dequantize(q).features, y.features.float())


def test_a_decoder_makes_all_candidates_and_keeps_those_of_the_target():
    target = SparseTensor.from_dense(torch.eye(8)[None, None])
    coarse = SparseTensor.from_dense(torch.eye(4)[None, None])
    weight, classes = torch.randn(5, 2, 2, 1), torch.randn(1, 1, 1, 5)

    def loss(features, weight, classes):
        up = sparse_conv_transpose(coarse.with_features(features), weight, stride=2)
        assert up.coords.shape[0] == 16  # every cell that the coarse ones reach
        wanted = find_cells(up, target) >= 0
        logits = subm_conv(up, classes).features[:, 0]
        y = prune(up, wanted)
        assert torch.equal(y.coords.long(), target.coords)
        error = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted.float())
        return error + y.features.square().mean()

    arguments = coarse.features, weight, classes
    for gradient in torch.func.grad(loss, (0, 1, 2))(*arguments):
        assert gradient.abs().min() > 0


def test_maps_of_other_cells_are_left_behind():
    x = nn.SubMConv1d(1, 2, 3)(SparseTensor.from_dense(torch.ones(1, 1, 5)))
    y = prune(nn.SparseConv1d(2, 2, 2, 2)(x), torch.tensor([False, True]))
    assert (y.maps, y.cells) == (None, ())
    assert nn.SubMConv1d(2, 1, 3)(y).features.shape == (1, 1)


X = SparseTensor.from_dense(torch.ones(1, 2, 3))
KEPT = torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: prune(X.features, KEPT), TypeError, "prune: x must be a SparseTensor, got Tensor"),
        (lambda: prune(X, KEPT.int()), TypeError, "kept must be a bool tensor, got torch.int32"),
        (lambda: prune(X, [True] * 3), TypeError, "kept must be a bool tensor, got list"),
        (lambda: prune(X, KEPT[:2]), ValueError, r"kept must have shape \(3,\), got \(2,\)"),
        (lambda: prune(X, KEPT.to("meta")), ValueError, "kept must be on cpu"),
        (
            lambda: find_cells(X, SparseTensor.from_dense(torch.ones(1, 2, 4))),
            ValueError,
            r"find_cells: among must have the grid \(1, 3\), got \(1, 4\)",
        ),
        (
            lambda: find_cells(X, SparseTensor(X.features, X.coords * 0, (3,), 1)),
            ValueError,
            "find_cells: coords must not repeat a row",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
