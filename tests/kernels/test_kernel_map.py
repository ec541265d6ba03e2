"""Kernel maps: the defining equation, brute force, the reference, and bad input."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fquant_kernels
from fquant_kernels import native
from fquant_kernels.kernel_map import cpu, reference
from tests.kernels.strategies import SETTINGS

needs_library = pytest.mark.skipif(
    native.why_missing() is not None, reason=f"no compiled kernels: {native.why_missing()}"
)


class MapCase(NamedTuple):
    coords: Tensor
    spatial_shape: list[int]
    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]

    @property
    def geometry(self) -> tuple[list[int], ...]:
        return tuple(self[1:])


def kernel_neighbors(coords: Tensor, out_coords: Tensor, *geometry: list[int]) -> Tensor:
    """The table of `cpu.kernel_neighbors`, the same one on every instruction set there is."""
    tables = [
        cpu.kernel_neighbors(coords, out_coords, *geometry, isa=isa)
        for isa in native.available_isas()
    ]
    for table in tables[1:]:
        assert torch.equal(table, tables[0])
    return tables[0]


def lists(axes: int, least: int, most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(least, most), min_size=axes, max_size=axes)


@st.composite
def map_cases(draw: st.DrawFn) -> MapCase:
    """Grids of 1 to 4 axes, any density, sorted or not, int32 or int64."""
    axes = draw(st.integers(1, 4))
    shape = draw(lists(axes, 1, (40, 12, 7, 5)[axes - 1]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    cells = torch.rand([draw(st.integers(1, 2)), *shape], generator=random)
    coords = (cells < density).nonzero()
    if draw(st.booleans()):
        coords = coords[torch.randperm(coords.shape[0], generator=random)]
    return MapCase(
        coords.to(draw(st.sampled_from([torch.int32, torch.int64]))),
        shape,
        draw(lists(axes, 1, (70, 6, 4, 3)[axes - 1])),
        draw(lists(axes, 1, 3)),
        draw(lists(axes, 0, 4)),
        draw(lists(axes, 1, 3)),
    )


@st.composite
def brick_cases(draw: st.DrawFn) -> MapCase:
    """Grids of several bricks of 8 cells and the kernels that are looked up in bricks."""
    axes = draw(st.integers(1, 3))
    shape = draw(lists(axes, 1, 20))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.01, 0.1, 0.5, 1.0]))
    cells = torch.rand([draw(st.integers(1, 2)), *shape], generator=random)
    coords = (cells < density).nonzero()
    coords = coords[torch.randperm(coords.shape[0], generator=random)]
    stride = draw(lists(axes, 1, 4))
    return MapCase(
        coords.to(draw(st.sampled_from([torch.int32, torch.int64]))),
        shape,
        [draw(st.integers(1, max(3, 2 * step))) for step in stride],
        stride,
        draw(lists(axes, 0, 4)),
        draw(st.sampled_from([[1] * axes, [2] * axes])),
    )


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
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
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
    finally:
        torch.set_num_threads(before)


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
@pytest.mark.parametrize("sorted_rows", [True, False])
def test_many_voxels_in_chunks_and_threads(sorted_rows: bool) -> None:
    random = torch.Generator().manual_seed(3)
    shape = [40, 90, 100]
    coords = (torch.rand([2, *shape], generator=random) < 0.15).nonzero().to(torch.int32)
    assert coords.shape[0] > 3 * 32768
    if not sorted_rows:
        coords = coords[torch.randperm(coords.shape[0], generator=random)]
    geometry = (shape, [3, 3, 3], [1, 1, 1], [1, 1, 1], [1, 1, 1])
    want = reference.kernel_neighbors(coords, coords, *geometry)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(kernel_neighbors(coords, coords, *geometry), want)
            copy = coords.clone()[:-1]  # other outputs than inputs: no symmetry to use
            assert torch.equal(kernel_neighbors(coords, copy, *geometry), want[:, :-1])
    finally:
        torch.set_num_threads(before)


@needs_library
def test_grids_of_more_than_2_to_the_31_cells() -> None:
    shape = [5000, 5000, 5000]
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 4999, 4999, 4999], [0, 858, 4967, 3296]])
    geometry = (shape, [3] * 3, [1] * 3, [1] * 3, [1] * 3)
    want = reference.kernel_neighbors(coords, coords, *geometry)
    for dtype in (torch.int32, torch.int64):
        table = kernel_neighbors(coords.to(dtype), coords.to(dtype), *geometry)
        assert torch.equal(table, want)
    huge = [2**20, 2**20, 2**20]  # keys and row numbers no longer share a word
    geometry = (huge, *geometry[1:])
    coords = torch.tensor([[1, 2**20 - 1, 7, 2**20 - 1], [0, 5, 5, 5], [0, 5, 5, 4]])
    want = reference.kernel_neighbors(coords, coords, *geometry)
    assert torch.equal(kernel_neighbors(coords, coords, *geometry), want)
    assert torch.equal(
        cpu.conv_output_coords(coords, *geometry), reference.conv_output_coords(coords, *geometry)
    )


@st.composite
def spread_cases(draw: st.DrawFn) -> MapCase:
    """Clusters of voxels far apart: bitmaps whose cells share places, or grids left to sorting."""
    axes = draw(st.integers(1, 4))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    clusters, per_cluster = draw(st.integers(1, 12)), draw(st.sampled_from([1, 30, 150]))
    # From a grid with fewer cells than the bitmap has bits to one no bitmap is made for.
    # The definition's own keys are int64, so no more than two axes are huge.
    sides = [draw(st.sampled_from([9, 64, 700, 2**11, 2**20])) for _ in range(axes)]
    sides = [side if axis < 2 else min(side, 64) for axis, side in enumerate(sides)]
    sides = draw(st.permutations(sides))
    # Centers at multiples of powers of two, so that many cells share a place; ends included.
    grain = draw(st.sampled_from([1, 64, 1024]))
    columns = [torch.randint(0, 2, (clusters * per_cluster,), generator=random)]
    for side in sides:
        center = torch.randint(0, side // min(grain, side) + 1, (clusters, 1), generator=random)
        near = torch.randint(-3, 4, (clusters, per_cluster), generator=random)
        columns.append((center * grain + near).clamp(0, side - 1).flatten())
    coords = torch.stack(columns, dim=1).unique(dim=0)
    coords = coords[torch.randperm(coords.shape[0], generator=random)]
    return MapCase(
        coords.to(draw(st.sampled_from([torch.int32, torch.int64]))),
        sides,
        draw(lists(axes, 1, (150, 9, 4, 3)[axes - 1])),
        draw(lists(axes, 1, 3)),
        draw(lists(axes, 0, 4)),
        draw(lists(axes, 1, 3)),
    )


@needs_library
@SETTINGS
@given(case=spread_cases(), data=st.data())
def test_sparse_grids_are_those_of_the_reference(case: MapCase, data: st.DataObject) -> None:
    out_coords = reference.conv_output_coords(case.coords, *case.geometry)
    assert torch.equal(cpu.conv_output_coords(case.coords, *case.geometry), out_coords)
    extra = data.draw(lists(len(case.stride), 0, 2))
    assert torch.equal(
        cpu.transposed_conv_output_coords(case.coords, *case.geometry, extra),
        reference.transposed_conv_output_coords(case.coords, *case.geometry, extra),
    )
    if data.draw(st.booleans()):  # outputs need not be in the grid, nor differ
        out_coords = out_coords + torch.randint(-4, 5, out_coords.shape, dtype=out_coords.dtype)
    table = reference.kernel_neighbors(case.coords, out_coords, *case.geometry)
    assert torch.equal(kernel_neighbors(case.coords, out_coords, *case.geometry), table)
    odd = [2 * (size // 2) + 1 for size in case.kernel_size]
    padding = [k // 2 * d for k, d in zip(odd, case.dilation, strict=True)]
    geometry = (case.spatial_shape, odd, [1] * len(odd), padding, case.dilation)
    table = reference.kernel_neighbors(case.coords, case.coords, *geometry)
    assert torch.equal(kernel_neighbors(case.coords, case.coords, *geometry), table)


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
@pytest.mark.parametrize("count", [12, 20])
def test_many_cells_of_one_place(count: int) -> None:
    """Lines 2^13 apart meet in a bitmap of at most 2^13 places; 20 cells of a place are too many."""
    y = torch.arange(count) * 2**13
    coords = torch.stack([0 * y, y, 0 * y + 5], dim=1).repeat(2, 1)
    coords[count:, 2] += 1
    coords = coords[torch.randperm(2 * count, generator=torch.Generator().manual_seed(1))]
    geometry = ([2**13 * count, 40], [3, 3], [1, 1], [1, 1], [1, 1])
    want = reference.kernel_neighbors(coords, coords, *geometry)
    assert torch.equal(kernel_neighbors(coords, coords, *geometry), want)
    assert torch.equal(kernel_neighbors(coords, coords[:5], *geometry), want[:, :5])


@needs_library
@pytest.mark.parametrize("side", [63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("dilation", [1, 2, 60])
def test_both_ends_of_the_last_axis(side: int, dilation: int) -> None:
    ends = torch.tensor([0, 1, 62, 63, 64, side - 2, side - 1]).clamp(max=side - 1).unique()
    coords = torch.cartesian_prod(torch.arange(2), torch.arange(3), ends)
    for kernel in (3, 5, 129):
        geometry = ([3, side], [3, kernel], [1, 1], [1, kernel // 2 * dilation], [1, dilation])
        want = reference.kernel_neighbors(coords, coords, *geometry)
        assert torch.equal(kernel_neighbors(coords, coords, *geometry), want)
        out_coords = reference.conv_output_coords(coords, *geometry)
        assert torch.equal(cpu.conv_output_coords(coords, *geometry), out_coords)
        want = reference.kernel_neighbors(coords, out_coords, *geometry)
        assert torch.equal(kernel_neighbors(coords, out_coords, *geometry), want)


@needs_library
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 0), (3, 1, 3), (5, 2, 0), (4, 2, 4)]
)
def test_inputs_at_both_ends_of_a_grid_reach_beyond_its_outputs(
    kernel: int, stride: int, padding: int
) -> None:
    # Beyond one end of an axis is where the next line of voxels begins.
    cells = torch.zeros(2, 8, 8)
    cells[:, ::7, ::4] = 1
    coords = cells.nonzero().int()
    geometry = ([8, 8], [kernel] * 2, [stride] * 2, [padding] * 2, [1, 1])
    outputs = reference.conv_output_coords(coords, *geometry)
    for some in (outputs, outputs[outputs[:, 1] <= 1], outputs[outputs[:, 1] >= 2]):
        table = reference.kernel_neighbors(coords, some, *geometry)
        assert torch.equal(kernel_neighbors(coords, some, *geometry), table)


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
