"""How fast are kernel maps on CPU, against spconv's, and how do they grow with the voxels?

Run by `python -m benches kernel_map [--quick]`. Voxels are unsorted, as a sensor gives them. The table
of a million voxels has 108 MB, and a system that maps and clears it anew for every call takes a
quarter of the time for that; `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184` in the
environment keeps memory, as the allocators that training runs use do.
"""

import argparse
import math
from typing import Any

import torch
from torch import Tensor

import fquant_kernels
from benches import harness
from fquant.testing import scenes
from fquant_kernels.kernel_map import reference

SUBM = ([3, 3, 3], [1, 1, 1], [1, 1, 1], [1, 1, 1])
STRIDED = ([3, 3, 3], [2, 2, 2], [1, 1, 1], [1, 1, 1])


def submanifold(scene: scenes.Scene) -> Tensor:
    coords = scene.coords
    return fquant_kernels.kernel_neighbors(coords, coords, scene.spatial_shape, *SUBM)


def strided(scene: scenes.Scene) -> Tensor:
    out_coords = fquant_kernels.conv_output_coords(scene.coords, scene.spatial_shape, *STRIDED)
    shape = scene.spatial_shape
    return fquant_kernels.kernel_neighbors(scene.coords, out_coords, shape, *STRIDED)


def spconv_map(scene: scenes.Scene, geometry: Any, is_submanifold: bool) -> Any:
    from spconv.core import ConvAlgo
    from spconv.pytorch import ops

    shape = list(scene.spatial_shape)
    none = [0, 0, 0]
    return ops.get_indice_pairs(
        scene.coords, 1, shape, ConvAlgo.Native, *geometry, none, is_submanifold
    )


def bench(scene: scenes.Scene, package: Any, rounds: int) -> tuple[int, float]:
    """Pairs of the submanifold map, and its seconds."""
    table = submanifold(scene)
    coords, shape = scene.coords, scene.spatial_shape
    assert torch.equal(table, reference.kernel_neighbors(coords, coords, shape, *SUBM))
    pairs, count = int((table >= 0).sum()), coords.shape[0]
    runs: dict[str, harness.Run] = {
        "subm": lambda: submanifold(scene),
        "strided": lambda: strided(scene),
        "transpose": lambda: fquant_kernels.transpose_neighbors(table, count),
    }
    if package is not None:
        found = spconv_map(scene, SUBM, True)[2]  # of opposite offsets one is counted
        assert 2 * int(found[:13].sum()) + count == pairs
        runs["spconv_subm"] = lambda: spconv_map(scene, SUBM, True)
        runs["spconv_strided"] = lambda: spconv_map(scene, STRIDED, False)
    times = harness.interleaved(runs, rounds)
    row: dict[str, Any] = {"scene": scene.name, "N": count, "taps": pairs / count}
    for name, timing in times.items():
        row[f"{name}_ms"] = timing.median * 1e3
    row["Mvoxel/s"] = count / times["subm"].median / 1e6
    if package is not None:
        row["subm_over_spconv"] = times["subm"].ratio(times["spconv_subm"])
        row["strided_over_spconv"] = times["strided"].ratio(times["spconv_strided"])
    harness.report(row)
    return pairs, times["subm"].median


def exponents(name: str, points: list[tuple[int, int, float]]) -> None:
    """Reports how time grows between the last two of (voxels, pairs, seconds)."""
    (first, few, start), (last, many, end) = points[-2:]
    growth = math.log(end / start)
    by_voxels, by_pairs = growth / math.log(last / first), growth / math.log(many / few)
    row = {"exponent_of_voxels": by_voxels, "exponent_of_pairs": by_pairs}
    harness.report({"growth": name, "from": first, "to": last, **row})


def growth(rounds: int) -> None:
    """Time against voxels and against pairs.

    Once with the first N voxels of a long recording, in the order they were seen: ten times as many
    are denser as well, with twice the pairs per voxel. And once with ten batch entries in place of
    one, which have as many pairs per voxel.
    """
    cloud = scenes.synthetic("nuscenes", sweeps=160)
    shape = cloud.spatial_shape
    points = []
    for size in (1_000, 10_000, 100_000, 1_000_000):
        part = scenes.Scene(f"part-{size}", cloud.coords[:size], shape)
        points.append((part.coords.shape[0], *bench(part, None, rounds)))
    exponents("denser", points)
    one = cloud.coords[:100_000]
    batch = torch.tensor([1, 0, 0, 0], dtype=one.dtype)
    ten = scenes.Scene("batch-of-10", torch.cat([one + i * batch for i in range(10)]), shape)
    exponents("batch", [points[-2], (ten.coords.shape[0], *bench(ten, None, rounds))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one scene, three rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    package = harness.spconv()
    harness.report(harness.machine())
    rounds = 3 if options.quick else 9
    chosen = [scenes.synthetic(name) for name in scenes.SENSORS] + scenes.real()
    for scene in chosen[:1] if options.quick else chosen:
        bench(scene, package, rounds)
    if not options.quick:
        growth(rounds)


if __name__ == "__main__":
    main()
