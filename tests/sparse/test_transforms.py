"""Sparse convolutions and pools under every transform."""

import pytest
import torch

import fquant as fq
from fquant.sparse import (
    SparseTensor,
    avg_pool,
    conv_map,
    global_avg_pool,
    global_max_pool,
    max_pool,
    sparse_conv,
    subm_conv,
    subm_map,
)
from fquant.testing.dense import conv_dense, read_cells
from fquant.testing.transforms import TransformCase, transform_matrix
from tests.oracles import clip

# A 5 x 4 grid of batch 2 with 9 cells; float64, where sums of these sizes differ by < 1e-12.
GENERATOR = torch.Generator().manual_seed(0)
ACTIVE = torch.rand(2, 1, 5, 4, generator=GENERATOR) < 0.25
CELLS = SparseTensor.from_dense(ACTIVE.double())
FEATURES = torch.randn(len(CELLS.coords), 2, dtype=torch.float64, generator=GENERATOR)
WEIGHT = torch.randn(3, 3, 3, 2, dtype=torch.float64, generator=GENERATOR)
BIAS = torch.randn(3, dtype=torch.float64, generator=GENERATOR)
SUBM = subm_map(CELLS, 3)
STRIDED = conv_map(CELLS, 3, stride=2, padding=1)


def dense_conv(kernel_map, stride):
    """The convolution of the densified tensor, read at the map's output cells."""

    def oracle(features, weight, bias):
        dense = CELLS.with_features(features).to_dense()
        y = conv_dense(dense, weight, bias, (stride, stride), (1, 1), (1, 1))
        out = SparseTensor(features, kernel_map.out_coords, kernel_map.out_shape, 2)
        return read_cells(y, out)

    return oracle


def dense_avg_pool(features):
    pooled = torch.nn.functional.avg_pool2d(CELLS.with_features(features).to_dense(), 3, 2, 1)
    return read_cells(pooled, SparseTensor(features, STRIDED.out_coords, STRIDED.out_shape, 2))


def largest_per_sample(features):
    return torch.stack([features[CELLS.coords[:, 0] == sample].amax(0) for sample in range(2)])


def dense_pool(features):
    dense = CELLS.with_features(features).to_dense()
    absent = (CELLS.with_features(torch.ones_like(features)).to_dense() == 0).double()
    pooled = torch.nn.functional.max_pool2d(dense - 1e9 * absent, 3, 2, 1)
    return read_cells(pooled, SparseTensor(features, STRIDED.out_coords, STRIDED.out_shape, 2))


SPARSE = [
    TransformCase(
        "subm_conv",
        lambda f, w, b: subm_conv(CELLS.with_features(f), w, b, kernel_map=SUBM).features,
        dense_conv(SUBM, 1),
        dense_conv(SUBM, 1),
        (FEATURES, WEIGHT, BIAS),
        atol=1e-12,
    ),
    TransformCase(
        "sparse_conv",
        lambda f, w, b: sparse_conv(CELLS.with_features(f), w, b, kernel_map=STRIDED).features,
        dense_conv(STRIDED, 2),
        dense_conv(STRIDED, 2),
        (FEATURES, WEIGHT, BIAS),
        atol=1e-12,
    ),
    TransformCase(
        "max_pool",
        lambda f: max_pool(CELLS.with_features(f), 3, kernel_map=STRIDED).features,
        dense_pool,
        dense_pool,
        (FEATURES,),
        atol=1e-12,
    ),
    TransformCase(
        "avg_pool",
        lambda f: avg_pool(CELLS.with_features(f), 3, kernel_map=STRIDED).features,
        dense_avg_pool,
        dense_avg_pool,
        (FEATURES,),
        atol=1e-12,
    ),
    TransformCase(
        "global_avg_pool",
        lambda f: global_avg_pool(CELLS.with_features(f)),
        lambda f: CELLS.with_features(f).to_dense().mean(dim=(2, 3)),
        lambda f: CELLS.with_features(f).to_dense().mean(dim=(2, 3)),
        (FEATURES,),
        atol=1e-12,
    ),
    TransformCase(
        "global_max_pool",
        lambda f: global_max_pool(CELLS.with_features(f)),
        largest_per_sample,
        largest_per_sample,
        (FEATURES,),
    ),
    TransformCase(
        "to_dense",
        lambda f: CELLS.with_features(f).to_dense(),
        lambda f: (
            torch.zeros(2, 5, 4, 2, dtype=f.dtype)
            .index_put(tuple(CELLS.coords.T), f)
            .permute(0, 3, 1, 2)
        ),
        lambda f: (
            torch.zeros(2, 5, 4, 2, dtype=f.dtype)
            .index_put(tuple(CELLS.coords.T), f)
            .permute(0, 3, 1, 2)
        ),
        (FEATURES,),
    ),
    TransformCase(
        "fake_quantized_subm_conv",
        lambda f, scale: (
            subm_conv(
                fq.fake_quantize(CELLS.with_features(f), scale), WEIGHT, kernel_map=SUBM
            ).features
        ),
        lambda f, scale: dense_conv(SUBM, 1)(
            (f / scale).round().clamp(-128, 127) * scale, WEIGHT, None
        ),
        lambda f, scale: (
            dense_conv(SUBM, 1)(clip(f, -128 * scale, 127 * scale), WEIGHT, None)
            + _product_terms(f, scale)
        ),
        (FEATURES, torch.tensor(0.01, dtype=torch.float64)),
        atol=1e-12,
    ),
]


def _product_terms(features, scale):
    """Zero: the convolution is linear, so its derivative does not depend on the rounded values."""
    return 0.0 * features.sum() * scale


@pytest.mark.parametrize(("case", "check"), transform_matrix(SPARSE))
def test_transform_matrix(case, check):
    check(case)
