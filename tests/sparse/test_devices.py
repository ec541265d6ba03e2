"""Functions of sparse tensors name the argument that is on another device, or on none.

Layers as modules are in `test_edges.py`.
"""

import pytest
import torch

from fquant.sparse import (
    SparseTensor,
    add_features,
    batch_norm,
    conv_map,
    from_points,
    join_features,
    nn,
    sparse_add,
    subm_map,
    transposed_conv_map,
    union_maps,
)


def on_meta(x):
    return x.with_features(x.features.to("meta"))


X = SparseTensor.create(torch.ones(1, 3), torch.tensor([[0, 1, 1]]), (6, 6), 1)
META = SparseTensor(X.features.to("meta"), X.coords.to("meta"), X.spatial_shape, 1)
ZEROS, ONES = torch.zeros(3), torch.ones(3)
POINTS = torch.zeros(2, 3)
RANGE = (1.0, [0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sparse_add(X, META), "sparse_add: tensors must be on cpu like"),
        (lambda: sparse_add(X, on_meta(X)), "sparse_add: coords must be on meta like"),
        (
            lambda: sparse_add(META, META, kernel_maps=union_maps(X, X)),
            "sparse_add: kernel_maps must be on meta like the features, got cpu",
        ),
        (lambda: nn.AddTable()([X, META]), "add_features: tensors must be on cpu like"),
        (lambda: add_features(X, on_meta(X)), "add_features: coords must be on meta like"),
        (lambda: join_features(X, on_meta(X)), "join_features: coords must be on meta like"),
        (lambda: batch_norm(META, ZEROS, ONES), "batch_norm: running_mean must be on meta like"),
        (
            lambda: batch_norm(X, ZEROS, ONES, ONES.to("meta"), training=True),
            "batch_norm: weight must be on cpu like the features, got meta",
        ),
        (
            lambda: from_points(POINTS, POINTS.to("meta"), *RANGE),
            "from_points: points must be on meta like the features, got cpu",
        ),
        (
            lambda: from_points(POINTS, POINTS, *RANGE, batch=POINTS[:, 0].int().to("meta")),
            "from_points: batch must be on cpu like the features, got meta",
        ),
        (lambda: from_points(POINTS.to("meta"), POINTS, *RANGE), "points must have data"),
        (lambda: union_maps(META, META), "union_maps: coords must have data"),
        (lambda: subm_map(META, 3), "subm_map: coords must have data"),
        (lambda: conv_map(META, 3), "conv_map: coords must have data"),
        (lambda: transposed_conv_map(META, 3), "transposed_conv_map: coords must have data"),
    ],
)
def test_devices_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
