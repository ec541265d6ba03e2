"""Kernel maps of many voxels, and of grids that are large, far apart or cut off."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fquant_kernels.kernel_map import cpu, reference
from tests.kernels.library import needs_library, num_threads
from tests.kernels.map_cases import MapCase, kernel_neighbors, lists, spread_cases
from tests.kernels.strategies import SETTINGS


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
    for threads in (1, 2, 5):
        with num_threads(threads):
            assert torch.equal(kernel_neighbors(coords, coords, *geometry), want)
            copy = coords.clone()[:-1]  # other outputs than inputs: no symmetry to use
            assert torch.equal(kernel_neighbors(coords, copy, *geometry), want[:, :-1])


@needs_library
@pytest.mark.parametrize(
    ("shape", "grids"), [([30, 33], 300), ([12, 14, 17], 200), ([3, 9, 17], 400)]
)
@pytest.mark.parametrize("seed", range(4))
def test_many_grids_in_order(shape: list[int], grids: int, seed: int) -> None:
    """Grids from full to empty, so that work is divided anywhere in them; the longest axis last."""
    random = torch.Generator().manual_seed(seed)
    ones = [1] * len(shape)
    density = torch.rand([grids, *ones], generator=random) ** 2
    coords = (torch.rand([grids, *shape], generator=random) < density).nonzero().to(torch.int32)
    geometry = (shape, [3] * len(shape), ones, ones, ones)
    want = reference.kernel_neighbors(coords, coords, *geometry)
    for threads in (1, 2):
        with num_threads(threads):
            assert torch.equal(kernel_neighbors(coords, coords, *geometry), want)


@needs_library
@pytest.mark.parametrize(("line", "column"), [(0, 1), (1, -1), (1, 0), (1, 1)])
def test_a_voxel_before_another_in_a_later_brick(line: int, column: int) -> None:
    """Bricks are written 512 at a time; the last voxel of 512 bricks finds one in a brick after them."""
    planes, lines, columns = 24, 20, 5  # the longest axis is outermost
    corners = 8 * torch.cartesian_prod(*map(torch.arange, (planes, lines, columns)))
    here = 5 * lines * columns + 2 * columns + 2
    is_first = torch.cat([corners[: here - 2], corners[here - 1 : here]])
    assert len(is_first) == 511
    at = corners[here] + torch.tensor([4, *((0, 3, 7)[1 + step] for step in (line, column))])
    found = at + torch.tensor([-1, line or -1, column])
    others = corners[6 * lines * columns :].repeat_interleave(4, dim=0)
    others[:, 2] += torch.arange(len(others)) % 4
    cells = torch.cat([is_first, at[None], others, found[None]])
    coords = torch.nn.functional.pad(cells, (1, 0)).to(torch.int32)
    geometry = ([8 * planes, 8 * lines, 8 * columns], [3] * 3, [1] * 3, [1] * 3, [1] * 3)
    want = reference.kernel_neighbors(coords, coords, *geometry)
    assert (want[:, 511] == len(coords) - 1).any()
    with num_threads(1):
        assert torch.equal(kernel_neighbors(coords, coords, *geometry), want)


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
