"""SparseTensor: dense and back, and what it refuses."""

import pytest
import torch
from hypothesis import given

from fquant.sparse import SparseTensor, conv_map, subm_map
from fquant.testing import strategies


@given(strategies.sparse_tensors())
def test_dense_and_back(x):
    dense = x.to_dense()
    assert dense.shape == (x.batch_size, x.features.shape[1], *x.spatial_shape)
    back = SparseTensor.from_dense(dense)
    assert torch.equal(back.to_dense(), dense)
    assert back.spatial_shape == x.spatial_shape
    assert back.batch_size == x.batch_size


@given(strategies.sparse_tensors())
def test_from_dense_sorts_rows_and_keeps_non_zero_cells(x):
    back = SparseTensor.from_dense(x.to_dense())
    rows = [tuple(row) for row in back.coords.tolist()]
    assert rows == sorted(rows)
    active = (x.features != 0).any(dim=1)
    assert set(rows) == {tuple(row) for row in x.coords[active].tolist()}


def test_dense_needs_float_features():
    import fquant as fq

    x = fq.quantize(SparseTensor.from_dense(torch.ones(1, 1, 2)), 0.1)
    with pytest.raises(TypeError, match=r"to_dense: features must be a tensor, got QTensor"):
        x.to_dense()
    assert torch.allclose(fq.dequantize(x).to_dense(), torch.ones(1, 1, 2))


ONE = torch.zeros(1, 3, dtype=torch.int64)
FEATURE = torch.ones(1, 2)


def create(features=FEATURE, coords=ONE, shape=(4, 4), batch_size=1):
    return SparseTensor.create(features, coords, shape, batch_size)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: create(coords=ONE.float()), TypeError, "int32 or int64 tensor, got torch.float32"),
        (lambda: create(coords=[[0, 0, 0]]), TypeError, "int32 or int64 tensor, got list"),
        (lambda: create(torch.ones(2, 2)), ValueError, r"N = 1 like coords, got \(2, 2\)"),
        (
            lambda: create(FEATURE.to("meta")),
            ValueError,
            "coords must be on meta like the features",
        ),
        (lambda: create(torch.ones(1)), ValueError, r"shape \(N, C\)"),
        (lambda: create(coords=ONE[:, :2]), ValueError, r"coords must have shape \(N, 3\)"),
        (lambda: create(coords=ONE - 1), ValueError, r"got row \[-1, -1, -1\]"),
        (lambda: create(coords=ONE + 1), ValueError, r"got row \[1, 1, 1\]"),
        (lambda: create(coords=ONE + torch.tensor([0, 0, 4])), ValueError, r"got row \[0, 0, 4\]"),
        (
            lambda: create(torch.ones(3, 2), torch.tensor([[0, 1, 2], [0, 0, 0], [0, 1, 2]])),
            ValueError,
            r"must not repeat a row, got \[0, 1, 2\] twice",
        ),
        (lambda: create(shape=(4, 0)), ValueError, "1 to 4 positive sizes"),
        (lambda: create(shape=()), ValueError, "1 to 4 positive sizes"),
        (lambda: create(batch_size=0), ValueError, "batch_size must be a positive int, got 0"),
        (lambda: create(shape=(2**32, 2**31)), ValueError, r"below 2\^63"),
        (lambda: create(shape=(2**31, 2**31), batch_size=2), ValueError, r"below 2\^63"),
        (lambda: SparseTensor.from_dense(torch.ones(2, 2)), ValueError, "1 to 4 spatial axes"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("build", [lambda x: subm_map(x, 3), lambda x: conv_map(x, 2, 2)])
def test_kernel_maps_refuse_what_create_refuses(build):
    twice = SparseTensor(torch.ones(2, 1), torch.zeros(2, 2, dtype=torch.int64), (4,), 1)
    with pytest.raises(ValueError, match=r"_map: coords must not repeat a row"):
        build(twice)


def test_grids_beyond_2_to_31_cells():
    far = torch.tensor([[0, 0, 0, 0], [0, 2999, 2999, 2999], [0, 2999, 2999, 2998], [0, 1, 0, 0]])
    x = SparseTensor.create(torch.ones(4, 1), far, (3000, 3000, 3000), 1)
    neighbors = subm_map(x, 3).neighbors
    assert (neighbors >= 0).sum(0).tolist() == [2, 2, 2, 2]
