"""Kernel maps: every pair obeys the equation, and brute force finds no other."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fquant_kernels
from fquant.sparse import SparseTensor, conv_map, subm_map, transpose_map
from fquant.testing import strategies


def pairs_of(kernel_map):
    """All (offset number, input cell, output cell) of a map."""
    inputs = [tuple(row) for row in kernel_map.in_coords.tolist()]
    outputs = [tuple(row) for row in kernel_map.out_coords.tolist()]
    table = kernel_map.neighbors.tolist()
    return {
        (k, inputs[i], outputs[m])
        for k, row in enumerate(table)
        for m, i in enumerate(row)
        if i >= 0
    }


def brute_force(x, out_shape, geometry, outputs=None):
    """All pairs by trying every output cell of the grid (or those given) and every offset."""
    kernel, stride, padding, dilation = geometry
    active = {tuple(row) for row in x.coords.tolist()}
    grid = itertools.product(range(x.batch_size), *map(range, out_shape))
    found = set()
    for cell in grid if outputs is None else outputs:
        for k, offset in enumerate(itertools.product(*map(range, kernel))):
            source = tuple(
                o * s - p + t * d
                for o, s, p, t, d in zip(cell[1:], stride, padding, offset, dilation, strict=True)
            )
            if (cell[0], *source) in active:
                found.add((k, (cell[0], *source), tuple(cell)))
    return found


@given(st.data())
def test_conv_map_is_what_brute_force_finds(data):
    x = data.draw(strategies.sparse_tensors(max_side=4, max_cells=12))
    geometry = data.draw(strategies.conv_geometries(x.spatial_shape))
    kernel_map = conv_map(x, *geometry)
    expected = brute_force(x, kernel_map.out_shape, geometry)
    assert pairs_of(kernel_map) == expected
    rows = [tuple(row) for row in kernel_map.out_coords.tolist()]
    assert rows == sorted({cell for _, _, cell in expected})
    assert kernel_map.neighbors.shape == (math.prod(geometry.kernel_size), len(rows))
    assert kernel_map.neighbors.dtype == torch.int32
    assert kernel_map.out_coords.dtype == x.coords.dtype


@given(st.data())
def test_subm_map_is_what_brute_force_finds(data):
    x = data.draw(strategies.sparse_tensors(max_side=4, max_cells=12))
    axes = len(x.spatial_shape)
    kernel = tuple(data.draw(st.sampled_from([1, 3, 5])) for _ in range(axes))
    dilation = tuple(data.draw(st.integers(1, 2)) for _ in range(axes))
    if math.prod(kernel) > 125:
        kernel = (3,) * axes
    padding = tuple(k // 2 * d for k, d in zip(kernel, dilation, strict=True))
    kernel_map = subm_map(x, kernel, dilation)
    cells = [tuple(row) for row in x.coords.tolist()]
    geometry = (kernel, (1,) * axes, padding, dilation)
    assert pairs_of(kernel_map) == brute_force(x, x.spatial_shape, geometry, cells)
    assert kernel_map.out_coords is x.coords


@given(st.data())
def test_transposing_twice_gives_the_map_back(data):
    x = data.draw(strategies.sparse_tensors())
    kernel_map = conv_map(x, *data.draw(strategies.conv_geometries(x.spatial_shape)))
    transposed = transpose_map(kernel_map)
    assert pairs_of(transposed) == {(k, o, i) for k, i, o in pairs_of(kernel_map)}
    assert torch.equal(transpose_map(transposed).neighbors, kernel_map.neighbors)


@given(strategies.sparse_tensors())
def test_subm_map_is_symmetric(x):
    """Offset k from a to b is offset K - 1 - k from b to a."""
    kernel_map = subm_map(x, 3)
    assert torch.equal(transpose_map(kernel_map).neighbors.flip(0), kernel_map.neighbors)


@given(st.data())
def test_transposed_conv_output_coords_are_all_reached_cells(data):
    x = data.draw(strategies.sparse_tensors(max_side=3, max_cells=8))
    kernel, stride, padding, dilation = data.draw(strategies.conv_geometries(x.spatial_shape))
    extra = (0,) * len(kernel)
    out_shape = fquant_kernels.kernel_map.transposed_conv_output_shape(
        x.spatial_shape, kernel, stride, padding, dilation, extra
    )
    reached = set()
    for batch, *cell in x.coords.tolist():
        for offset in itertools.product(*map(range, kernel)):
            axes = zip(cell, stride, padding, offset, dilation, strict=True)
            out = tuple(c * s - p + k * d for c, s, p, k, d in axes)
            if all(0 <= o < n for o, n in zip(out, out_shape, strict=True)):
                reached.add((batch, *out))
    if min(out_shape) >= 1:
        out_coords = fquant_kernels.transposed_conv_output_coords(
            x.coords, x.spatial_shape, kernel, stride, padding, dilation, extra
        )
        assert [tuple(row) for row in out_coords.tolist()] == sorted(reached)


def test_a_map_stands_for_its_outputs():
    x = SparseTensor.from_dense(torch.ones(1, 1, 8))
    coarse = conv_map(x, 2, 2)
    assert torch.equal(subm_map(coarse, 3).in_coords, coarse.out_coords)
    assert conv_map(coarse, 2, 2).out_shape == (2,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: subm_map(x, 2), "subm_map: kernel_size must be odd.*got"),
        (lambda x: subm_map(x, (3, 3)), "kernel_size must be an int or 1 ints of at least 1"),
        (lambda x: conv_map(x, 0), "kernel_size must be an int or 1 ints of at least 1, got 0"),
        (lambda x: conv_map(x, 2, 0), "stride must be"),
        (lambda x: conv_map(x, 2, 1, -1), "padding must be an int or 1 ints of at least 0, got -1"),
        (lambda x: conv_map(x, 2, 1, 0, 0), "dilation must be"),
        (lambda x: conv_map(x, 9), r"must fit the padded grid \(4,\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(SparseTensor.from_dense(torch.ones(1, 1, 4)))
