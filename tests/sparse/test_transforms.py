"""Every sparse operation under every transform, against torch's dense operators."""

import pytest
import torch

import fquant as fq
from fquant.sparse import (
    SparseTensor,
    add_features,
    avg_pool,
    batch_norm,
    conv_map,
    global_avg_pool,
    global_max_pool,
    join_features,
    max_pool,
    prune,
    sparse_add,
    sparse_conv,
    sparse_conv_transpose,
    sparse_inverse_conv,
    subm_conv,
    subm_map,
    transposed_conv_map,
    union_maps,
)
from fquant.testing.dense import conv_dense, read_cells
from fquant.testing.transforms import TransformCase, transform_matrix

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
            dense_conv(SUBM, 1)(f.clamp(-128 * scale, 127 * scale), WEIGHT, None)
            + _product_terms(f, scale)
        ),
        (FEATURES, torch.tensor(0.01, dtype=torch.float64)),
        atol=1e-12,
    ),
]


def _product_terms(features, scale):
    """Zero: the convolution is linear, so its derivative does not depend on the rounded values."""
    return 0.0 * features.sum() * scale


# The second set of cells for sums over unions, and what makes and unmakes cells.
OTHER = SparseTensor.from_dense((torch.rand(2, 1, 5, 4, generator=GENERATOR) < 0.25).double())
OTHER_FEATURES = torch.randn(len(OTHER.coords), 2, dtype=torch.float64, generator=GENERATOR)
UNION = union_maps(CELLS, OTHER)
RAISED = transposed_conv_map(CELLS, 3, stride=2, padding=1)
COARSE = torch.randn(len(STRIDED.out_coords), 2, dtype=torch.float64, generator=GENERATOR)
GAMMA, BETA = torch.tensor([1.5, -0.5]).double(), torch.tensor([0.3, 0.1]).double()
MEAN, VAR = torch.tensor([0.2, -1.0]).double(), torch.tensor([0.5, 2.0]).double()


def at(kernel_map, features):
    return SparseTensor(features, kernel_map.out_coords, kernel_map.out_shape, 2)


def dense_transposed(features, weight, bias):
    dense = CELLS.with_features(features).to_dense()
    kernel = weight.movedim(-1, 0)
    y = torch.nn.functional.conv_transpose2d(dense, kernel, bias, 2, 1)
    return read_cells(y, at(RAISED, features))


def dense_inverse(features, weight, bias):
    dense = at(STRIDED, features).to_dense()
    y = torch.nn.functional.conv_transpose2d(dense, weight.movedim(-1, 0), bias, 2, 1, (0, 1))
    return read_cells(y, CELLS)


def dense_sum(a, b):
    dense = CELLS.with_features(a).to_dense() + OTHER.with_features(b).to_dense()
    return read_cells(dense, at(UNION[0], a))


def normed(training):
    def function(f, gamma, beta):
        x = CELLS.with_features(f)
        y, mean, var = batch_norm(x, MEAN, VAR, gamma, beta, training=training)
        return torch.cat([y.features, mean[None], var[None]])

    def by_formula(f, gamma, beta):
        mean, var = (f.mean(0), f.var(0, unbiased=False)) if training else (MEAN, VAR)
        y = (f - mean) / (var + 1e-5).sqrt() * gamma + beta
        still = f.detach()
        kept = 0.9 if training else 1.0
        rest = [kept * MEAN + (1 - kept) * still.mean(0), kept * VAR + (1 - kept) * still.var(0)]
        return torch.cat([y, *(r[None] for r in rest)])

    name = "batch_norm in training" if training else "batch_norm"
    arguments = (FEATURES, GAMMA, BETA)
    return TransformCase(name, function, by_formula, by_formula, arguments, atol=1e-10)


SPARSE += [
    TransformCase(
        "sparse_conv_transpose",
        lambda f, w, b: (
            sparse_conv_transpose(CELLS.with_features(f), w, b, kernel_map=RAISED).features
        ),
        dense_transposed,
        dense_transposed,
        (FEATURES, WEIGHT, BIAS),
        atol=1e-12,
    ),
    TransformCase(
        "sparse_inverse_conv",
        lambda f, w, b: sparse_inverse_conv(at(STRIDED, f), w, b, kernel_map=STRIDED).features,
        dense_inverse,
        dense_inverse,
        (COARSE, WEIGHT, BIAS),
        atol=1e-12,
    ),
    TransformCase(
        "sparse_add",
        lambda a, b: (
            sparse_add(CELLS.with_features(a), OTHER.with_features(b), kernel_maps=UNION).features
        ),
        dense_sum,
        dense_sum,
        (FEATURES, OTHER_FEATURES),
    ),
    TransformCase(
        "add_features and join_features",
        lambda a, b: (
            join_features(
                add_features(CELLS.with_features(a), CELLS.with_features(b)), CELLS.with_features(b)
            ).features
        ),
        lambda a, b: torch.cat([a + b, b], dim=1),
        lambda a, b: torch.cat([a + b, b], dim=1),
        (FEATURES, FEATURES.flip(0)),
    ),
    normed(training=True),
    normed(training=False),
]


def there_and_back(f, w, b):
    """Each convolution but the transposed one, batch norm, sum, join, and both pools, in a row."""
    x = CELLS.with_features(f)
    fine = subm_conv(x, w, b, kernel_map=SUBM)
    normed = batch_norm(fine, torch.zeros_like(b), torch.ones_like(b), b, b, training=True)[0]
    coarse = sparse_conv(normed, w.transpose(0, -1), kernel_map=STRIDED)
    back = sparse_inverse_conv(coarse, w, b, kernel_map=STRIDED)
    y = join_features(add_features(back, fine), x)
    pooled = (p(y, 3, kernel_map=STRIDED).features for p in (max_pool, avg_pool))
    return torch.cat([*pooled], dim=1)


def there_and_back_dense(f, w, b):
    fine = dense_conv(SUBM, 1)(f, w, b)
    step = (fine.var(0, unbiased=False) + 1e-5).sqrt()
    normed = (fine - fine.mean(0)) / step * b + b
    coarse = dense_conv(STRIDED, 2)(normed, w.transpose(0, -1), None)
    y = torch.cat([dense_inverse(coarse, w, b) + fine, f], dim=1)
    return torch.cat([dense_pool(y), dense_avg_pool(y)], dim=1)


def out_and_up(f, w, b):
    """What the other leaves out."""
    x = CELLS.with_features(fq.fake_quantize(f, 0.01))
    raised = sparse_conv_transpose(x, w, b, kernel_map=RAISED)
    both = sparse_add(x, OTHER.with_features(OTHER_FEATURES), kernel_maps=UNION)
    parts = [raised.features, both.features, x.to_dense(), global_avg_pool(x), global_max_pool(x)]
    return torch.cat([part.flatten() for part in parts])


def out_and_up_dense(f, w, b):
    inside = f.clamp(-1.28, 1.27)
    f = inside + ((f / 0.01).round().clamp(-128, 127) * 0.01 - inside).detach()
    dense = CELLS.with_features(f).to_dense()
    parts = [dense_transposed(f, w, b), dense_sum(f, OTHER_FEATURES), dense]
    parts += [dense.mean(dim=(2, 3)), largest_per_sample(f)]
    return torch.cat([part.flatten() for part in parts])


# What is compiled or exported is a dozen operations at a time; all else is one at a time.
ROWS = [
    TransformCase(
        "there and back",
        there_and_back,
        there_and_back_dense,
        there_and_back_dense,
        (FEATURES, WEIGHT, BIAS),
        atol=1e-8,
    ),
    TransformCase(
        "out and up",
        out_and_up,
        out_and_up_dense,
        out_and_up_dense,
        (FEATURES, WEIGHT, BIAS),
        atol=1e-10,
    ),
]


def of_graphs(param):
    return param.values[1].__name__.startswith(("compile", "export"))


@pytest.mark.parametrize(
    ("case", "check"),
    [
        *(p for p in transform_matrix(SPARSE) if not of_graphs(p)),
        *(p for p in transform_matrix(ROWS) if of_graphs(p)),
    ],
)
def test_transform_matrix(case, check):
    check(case)


def test_pruning_is_differentiable():
    """How many cells remain is a matter of values: gradients, Jacobians and vmap, but no compile."""
    kept = torch.arange(len(FEATURES)) % 2 == 0

    def function(f):
        return prune(CELLS.with_features(f), kept).features.sin()

    expected = torch.func.jacrev(lambda f: f[::2].sin())(FEATURES)
    assert torch.equal(torch.func.jacrev(function)(FEATURES), expected)
    assert torch.equal(torch.func.jacfwd(function)(FEATURES), expected)
    stacked = torch.stack([FEATURES, 2 * FEATURES])
    assert torch.equal(torch.vmap(function)(stacked), stacked[:, ::2].sin())
