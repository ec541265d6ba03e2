"""How much memory and time does a large scene take, in int8 and in float32?

The network is the U-Net of the LiDAR example. Scans of a nuScenes-like sensor lie side by side
until there are as many voxels as asked for, in one sample. Peak memory is the process's largest
resident size, so each precision runs in a process of its own.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time

import torch

from benches import harness
from fquant.examples.lidar_segmentation import unet
from fquant.examples.sparse_recipe import Batch, Trained, deploy, quantize_network
from fquant.sparse import SparseTensor
from fquant.sparse_network import (
    Deployed,
    SparseNetwork,
    convolutions,
    first_and_last,
    int8_network,
    make_maps,
)
from fquant.testing import scenes


def side_by_side(num_voxels: int) -> SparseTensor:
    """Returns copies of one scan on a grid of copies, cut to num_voxels, with three features."""
    scene = scenes.synthetic("nuscenes")
    copies = math.ceil(num_voxels / len(scene.coords))
    rows = math.ceil(math.sqrt(copies))
    z, y, x = scene.spatial_shape
    places = [
        scene.coords + torch.tensor([0, 0, y * (i // rows), x * (i % rows)], dtype=torch.int32)
        for i in range(copies)
    ]
    coords = torch.cat(places)[:num_voxels]
    features = torch.randn(num_voxels, 3, generator=torch.Generator().manual_seed(0))
    return SparseTensor(features, coords, (z, y * rows, x * rows), 1)


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(num_voxels: int, precision: str) -> None:
    layers = unet(3, 3)
    int8 = convolutions(layers) - first_and_last(layers)
    small = side_by_side(20_000)
    state = SparseNetwork(layers)
    trained = Trained(dict(state.named_parameters()), dict(state.named_buffers()))
    batch = Batch(small, make_maps(layers, small), torch.arange(0), torch.arange(0))
    quantized = quantize_network(layers, 3, int8, trained, [batch], progress=False)
    if precision == "int8":
        network, record = int8_network(layers, int8), deploy(layers, quantized)
    else:
        network, record = int8_network(layers, frozenset()), Deployed(dict(quantized.params), {})
    x = side_by_side(num_voxels)
    before = peak_bytes()
    start = time.perf_counter()
    maps = make_maps(layers, x)
    mapped, map_peak = time.perf_counter(), peak_bytes()
    with torch.no_grad():
        y = network(record, x, maps).features
    done = time.perf_counter()
    assert y.shape == (num_voxels, 3)
    assert bool(y.isfinite().all())
    harness.report(
        {
            "precision": precision,
            "voxels": num_voxels,
            "maps_bytes": sum(m.neighbors.nbytes for m in maps.values()),
            "before_GB": before / 1e9,
            "after_maps_GB": map_peak / 1e9,
            "peak_GB": peak_bytes() / 1e9,
            "peak_bytes_per_voxel": peak_bytes() / num_voxels,
            "maps_s": mapped - start,
            "network_s": done - mapped,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--voxels", type=int, default=5_000_000)
    parser.add_argument("--precision", choices=("int8", "float"), help="this process only")
    options = parser.parse_args()
    if options.precision:
        measure(options.voxels, options.precision)
        return
    print(json.dumps(harness.machine()), flush=True)
    for precision in ("int8", "float"):
        command = [sys.executable, "-m", "benches.bench_scale", "--voxels", str(options.voxels)]
        subprocess.run([*command, "--precision", precision], check=True)


if __name__ == "__main__":
    main()
