"""LiDAR scans at 10 Hz through an int8 network: latency percentiles, and a cache of kernel maps.

    python -m fquant.examples.streaming [--quick] [--scans N]

A sensor drives along a scan (a real one from `$FQUANT_DATA/lidar` or `../shared/data/lidar` where
there is one, a generated one otherwise), then stands while its driver repeats the last scan. Each
scan is voxelized, its kernel maps are looked up by the content of its coordinates or made, and the
U-Net of `lidar_segmentation` runs in int8. Its weights are untrained: this is about time.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fquant.examples import sparse_recipe as recipe
from fquant.examples.lidar_segmentation import unet
from fquant.progress import progress_bar
from fquant.sparse import SparseTensor, from_points
from fquant.sparse_network import (
    MapCache,
    SparseNetwork,
    cached_maps,
    choose_int8,
    int8_network,
    make_maps,
    measured_times,
)
from fquant.testing import scenes

RATE = 10.0
SPEED = 2.5  # metres per second: over 80 scans it stays inside the one scan there is
DATA = "ouster_os1_128_frame0"
STAGES = ("voxelize", "maps made", "maps from cache", "network", "whole scan")


class Settings(NamedTuple):
    """The voxel grid: size of a voxel and range around the sensor, in metres."""

    voxel: float = 0.2
    reach: float = 40.0
    low: float = -3.0
    high: float = 5.0


class Result(NamedTuple):
    """What was measured.

    Attributes:
        seconds: `{stage: times}`, one per scan that went through the stage.
        cache: the cache after the last scan.
        voxels: of every scan.
        late: scans that took longer than a period of the sensor.
    """

    seconds: dict[str, list[float]]
    cache: MapCache
    voxels: list[int]
    late: int


def scan_points(quick: bool) -> Tensor:
    """Returns the points of one scan, `(P, 3)`: a real one if there is one and `quick` is False."""
    folder = scenes.data_folder()
    if folder is not None and not quick and (folder / f"{DATA}.npz").exists():
        points = scenes.load_arrays(folder / f"{DATA}.npz")["xyz"]
        return torch.from_numpy(points[np.isfinite(points).all(axis=1)].astype(np.float32))
    points, _ = scenes.labelled_scan(scenes.SENSORS["kitti"])
    return torch.from_numpy(points.astype(np.float32))


def stream(points: Tensor, scans: int, standing: int) -> Iterator[Tensor]:
    """Yields scans: first moving forward, each seen from where the sensor is by then, then repeated."""
    moved = points
    for i in range(scans):
        if i < scans - standing:
            moved = points - torch.tensor([i * SPEED / RATE, 0.0, 0.0])
        yield moved


def voxelized(points: Tensor, settings: Settings) -> SparseTensor:
    """Returns the voxels in range, with the features 1, height and distance."""
    away = points[:, :2].norm(dim=1)
    features = torch.stack([torch.ones(len(points)), points[:, 2] / 3, away / 50], dim=1)
    r = settings.reach
    lower, upper = (-r, -r, settings.low), (r, r, settings.high)
    return from_points(points, features, settings.voxel, lower, upper)[0]


def run(
    points: Tensor,
    scans: int,
    standing: int,
    settings: Settings,
    progress: bool | None = None,
) -> Result:
    """Runs the stream and prints percentiles."""
    layers = unet(3, 3)
    int8 = frozenset(c.layer for c in choose_int8(layers, measured_times()[1]) if c.int8)
    first = voxelized(points, settings)
    maps = make_maps(layers, first)
    model = SparseNetwork(layers, batch_norm=True)
    trained = recipe.Trained(dict(model.named_parameters()), dict(model.named_buffers()))
    batch = recipe.Batch(first, maps, torch.arange(0), torch.arange(0))
    quantized = recipe.quantize_network(layers, 3, int8, trained, [batch], progress=False)
    deployed, network = recipe.deploy(layers, quantized), int8_network(layers, int8)
    network(deployed, first, maps)  # the first call pays for what is made once

    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    voxels = []
    cache = MapCache.empty(capacity=4)
    todo = list(stream(points, scans, standing))
    for scan in progress_bar(todo, "scans", progress):
        start = time.perf_counter()
        x = voxelized(scan, settings)
        ready = time.perf_counter()
        hits = cache.hits
        maps, cache = cached_maps(layers, x, cache)
        mapped = time.perf_counter()
        network(deployed, x, maps)
        done = time.perf_counter()
        seconds["voxelize"].append(ready - start)
        seconds["maps from cache" if cache.hits > hits else "maps made"].append(mapped - ready)
        seconds["network"].append(done - mapped)
        seconds["whole scan"].append(done - start)
        voxels.append(len(x.coords))
    late = sum(t > 1 / RATE for t in seconds["whole scan"])
    result = Result(seconds, cache, voxels, late)
    print(summary(result))
    return result


def summary(result: Result) -> str:
    """Returns the percentiles of every stage as text."""
    lines = [f"{'milliseconds':<17}{'scans':>7}{'p50':>9}{'p95':>9}{'p99':>9}"]
    for stage, times in result.seconds.items():
        if times:
            p50, p95, p99 = (1e3 * np.percentile(times, [50, 95, 99])).tolist()
            lines.append(f"{stage:<17}{len(times):>7}{p50:>9.1f}{p95:>9.1f}{p99:>9.1f}")
    scans = len(result.voxels)
    lines.append(
        f"{scans} scans of {min(result.voxels):,} to {max(result.voxels):,} voxels, "
        f"{torch.get_num_threads()} threads; {result.late} took longer than "
        f"{1e3 / RATE:.0f} ms; the cache had the maps of {result.cache.hits}."
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> Result:
    """Runs the example from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few small scans")
    parser.add_argument(
        "--scans", type=int, default=100, help="default 100, a fifth of them standing"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    scans = 10 if options.quick else options.scans
    settings = Settings(reach=6.0) if options.quick else Settings()
    progress = False if options.no_progress else None
    return run(scan_points(options.quick), scans, max(1, scans // 5), settings, progress)


if __name__ == "__main__":
    main()
