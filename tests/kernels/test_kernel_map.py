"""Kernel maps: the defining equation, brute force, the reference, and bad input."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fquant_kernels
from fquant_kernels.kernel_map import cpu, reference
from tests.kernels.library import needs_library, num_threads
from tests.kernels.map_cases import (
    MapCase,
    brick_cases,
    kernel_neighbors,
    lists,
    map_cases,
    spread_cases,
)
from tests.kernels.strategies import SETTINGS


@SETTINGS
@given(case=map_cases())
def test_every_pair_satisfies_the_equation_and_no_other_does(case: MapCase) -> None:
    out_coords = fquant_kernels.conv_output_coords(case.coords, *case.geometry)
    neighbors = fquant_kernels.kernel_neighbors(case.coords, out_coords, *case.geometry)
    rows = {tuple(row): i for i, row in enumerate(case.coords.tolist())}
    offsets = list(itertools.product(*map(range, case.kernel_size)))
    outputs = out_coords.tolist()[:20]
    for k, m in itertools.product(
        range(0, len(offsets), 1 + len(offsets) // 30), range(len(outputs))
    ):
        batch, *at = outputs[m]
        voxel = [
            o * s - p + t * d
            for o, s, p, t, d in zip(
                at, case.stride, case.padding, offsets[k], case.dilation, strict=True
            )
        ]
        assert neighbors[k, m] == rows.get((batch, *voxel), -1)
    assert bool((neighbors >= 0).any(dim=0).all())  # no output without an input


@SETTINGS
@given(case=map_cases())
def test_outputs_are_the_windows_that_hold_an_active_voxel(case: MapCase) -> None:
    if math.prod(case.spatial_shape) > 200:
        return
    got = fquant_kernels.conv_output_coords(case.coords, *case.geometry)
    active = {tuple(row) for row in case.coords.tolist()}
    axes = [
        [
            (o, [o * s - p + k * d for k in range(size)])
            for o in range((n + 2 * p - d * (size - 1) - 1) // s + 1)
        ]
        for n, size, s, p, d in zip(*case.geometry, strict=True)
    ]
    want = [
        [batch, *(o for o, _ in window)]
        for batch in range(2)
        for window in itertools.product(*axes)
        if any((batch, *v) in active for v in itertools.product(*(reads for _, reads in window)))
    ]
    assert got.tolist() == want


@needs_library
@SETTINGS
@given(case=st.one_of(map_cases(), brick_cases()), threads=st.sampled_from([1, 2]), data=st.data())
def test_tables_and_outputs_are_those_of_the_reference(
    case: MapCase, threads: int, data: st.DataObject
) -> None:
    with num_threads(threads):
        want = reference.conv_output_coords(case.coords, *case.geometry)
        assert torch.equal(cpu.conv_output_coords(case.coords, *case.geometry), want)
        if data.draw(st.booleans()):  # outputs in any order, of either dtype
            want = want[torch.randperm(want.shape[0])].long()
            axis, most = data.draw(st.integers(1, len(case.stride))), data.draw(st.integers(0, 6))
            want = want[want[:, axis] <= most]  # inputs may reach beyond the outputs given
        table = reference.kernel_neighbors(case.coords, want, *case.geometry)
        assert torch.equal(kernel_neighbors(case.coords, want, *case.geometry), table)
        back = reference.transpose_neighbors(table, case.coords.shape[0])
        assert torch.equal(cpu.transpose_neighbors(table, case.coords.shape[0]), back)


@needs_library
@SETTINGS
@given(case=st.one_of(map_cases(), brick_cases()), data=st.data())
def test_submanifold_and_transposed_maps_are_those_of_the_reference(
    case: MapCase, data: st.DataObject
) -> None:
    odd = [2 * (size // 2) + 1 for size in case.kernel_size]
    padding = [k // 2 * d for k, d in zip(odd, case.dilation, strict=True)]
    ones = [1] * len(odd)
    geometry = (case.spatial_shape, odd, ones, padding, case.dilation)
    table = kernel_neighbors(case.coords, case.coords, *geometry)
    assert torch.equal(table, reference.kernel_neighbors(case.coords, case.coords, *geometry))
    extra = data.draw(lists(len(odd), 0, 2))
    assert torch.equal(
        cpu.transposed_conv_output_coords(case.coords, *case.geometry, extra),
        reference.transposed_conv_output_coords(case.coords, *case.geometry, extra),
    )


@SETTINGS
@given(case=map_cases())
def test_the_transpose_of_the_transpose_is_the_table(case: MapCase) -> None:
    out_coords = fquant_kernels.conv_output_coords(case.coords, *case.geometry)
    table = fquant_kernels.kernel_neighbors(case.coords, out_coords, *case.geometry)
    back = fquant_kernels.transpose_neighbors(table, case.coords.shape[0])
    again = fquant_kernels.transpose_neighbors(back, out_coords.shape[0])
    assert torch.equal(again, table)


@needs_library
@SETTINGS
@given(case=st.one_of(map_cases(), brick_cases(), spread_cases()), seed=st.integers(0, 2**32))
def test_of_equal_rows_the_first_counts(case: MapCase, seed: int) -> None:
    count = case.coords.shape[0]
    if count == 0:
        return
    random = torch.Generator().manual_seed(seed)
    picked = torch.randint(0, count, (2 * count,), generator=random)
    repeated = case.coords[picked]
    first = torch.full((count,), 2 * count)
    first.scatter_reduce_(0, picked, torch.arange(2 * count), "amin")
    once = first[first < 2 * count].sort().values
    out_coords = cpu.conv_output_coords(repeated, *case.geometry)
    assert torch.equal(out_coords, reference.conv_output_coords(repeated, *case.geometry))
    for outputs in (out_coords, repeated):
        table = reference.kernel_neighbors(repeated[once], outputs, *case.geometry)
        want = torch.where(table < 0, -1, once[table.long()]).to(torch.int32)
        assert torch.equal(kernel_neighbors(repeated, outputs, *case.geometry), want)


@needs_library
@SETTINGS
@given(case=map_cases(), data=st.data())
def test_repeated_or_outside_rows_stay_in_bounds(case: MapCase, data: st.DataObject) -> None:
    if case.coords.shape[0] == 0:
        return
    picked = torch.randint(0, case.coords.shape[0], (30,))
    coords = case.coords[picked]
    if data.draw(st.booleans()):
        coords = coords + torch.randint(-3, 4, coords.shape, dtype=coords.dtype)
    count = coords.shape[0]
    for out_coords in (coords, cpu.conv_output_coords(coords, *case.geometry)):
        table = kernel_neighbors(coords, out_coords, *case.geometry)
        assert int(table.min() if table.numel() else -1) >= -1
        assert int(table.max() if table.numel() else -1) < count
    ones = [1] * len(case.spatial_shape)
    table = kernel_neighbors(coords, coords, case.spatial_shape, ones, ones, [0] * len(ones), ones)
    assert int(table.min()) >= -1
    assert int(table.max()) < count


def test_bad_arguments_are_named() -> None:
    coords = torch.zeros((2, 4), dtype=torch.int32)
    three = [3, 3, 3]
    ones = [1, 1, 1]
    with pytest.raises(TypeError, match=r"coords must be int32 or int64, got torch\.float32"):
        fquant_kernels.conv_output_coords(coords.float(), three, ones, ones, ones, ones)
    with pytest.raises(ValueError, match="dilation must be 3 ints of at least 1"):
        fquant_kernels.conv_output_coords(coords, three, ones, ones, ones, [0, 1, 1])
    with pytest.raises(ValueError, match="coords must have shape"):
        fquant_kernels.kernel_neighbors(coords[:, :3], coords, three, ones, ones, ones, ones)
    with pytest.raises(TypeError, match="neighbors must be int32"):
        fquant_kernels.transpose_neighbors(coords.long(), 3)


@needs_library
def test_an_index_out_of_range_is_an_error() -> None:
    table = torch.tensor([[0, 5]], dtype=torch.int32)
    with pytest.raises(IndexError, match="below the number of input rows"):
        fquant_kernels.transpose_neighbors(table, 5)
    with pytest.raises(IndexError, match=r"must be in \[-1, 5\), got 0 to 5"):
        fquant_kernels.check_neighbors(table, 5)
    with pytest.raises(ValueError, match="read at most once"):
        fquant_kernels.check_neighbors(torch.tensor([[2, 2]], dtype=torch.int32), 5)
    fquant_kernels.check_neighbors(table, 6)
