"""Hypothesis strategies for kernel maps, and the table on every instruction set."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from fquant_kernels import native
from fquant_kernels.kernel_map import cpu


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
