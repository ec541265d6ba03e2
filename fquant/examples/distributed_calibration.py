"""Calibration of a sparse network over files of scans, on several processes.

    torchrun --nproc-per-node 2 -m fquant.examples.distributed_calibration FOLDER [--scales FILE]

Each process reads its share of the `.npz` files (points `xyz` in metres), observes them, and one
exchange merges what all saw: scales are, bit for bit, those of one process. Without torchrun it is
one process. Weights are untrained, the same everywhere by their seed.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed

import fquant as fq
from fquant.distributed import merge_stats_over_ranks
from fquant.examples.lidar_segmentation import unet
from fquant.examples.streaming import Settings, voxelized
from fquant.sparse_network import (
    SparseNetwork,
    convolutions,
    first_and_last,
    fold_network,
    int8_rules,
    make_maps,
    tie_scales,
)
from fquant.sparse_network.maps import Maps
from fquant.testing.scenes import load_arrays


def calibrated_scales(
    files: Sequence[Path], rank: int, world: int, settings: Settings
) -> dict[str, Tensor]:
    """Returns the scales after all files; this process reads every `world`-th from `rank` on."""
    layers = unet(3, 3)
    int8 = convolutions(layers) - first_and_last(layers)
    model = SparseNetwork(layers, batch_norm=False)
    params = fold_network(layers, SparseNetwork(layers).state_dict())

    def batch(file: Path) -> tuple[fq.sparse.SparseTensor, Maps]:
        points = torch.from_numpy(load_arrays(file)["xyz"].astype(np.float32))
        x = voxelized(points, settings)
        return x, make_maps(layers, x)

    plan = fq.make_plan(model, int8_rules(layers, int8), batch(files[0]))
    mine = (batch(file) for file in files[rank::world])
    stats = fq.calibrate_model(model, plan, params, mine, progress=False)
    if world > 1:
        stats = merge_stats_over_ranks(stats, plan.observers)
    return tie_scales(layers, int8, fq.finalize(plan, stats))


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Runs the example from the command line; returns the scales as lists."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with the files")
    parser.add_argument("--scales", type=Path, help="where to write the scales, as JSON")
    parser.add_argument("--reach", type=float, default=40.0, help="of the grid, in metres")
    options = parser.parse_args(arguments)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    files = sorted(options.folder.glob("*.npz"))
    if len(files) < world:
        parser.error(f"{options.folder} must have a .npz file per process, got {len(files)}")
    if world > 1:
        distributed.init_process_group("gloo")
    try:
        scales = calibrated_scales(files, rank, world, Settings(reach=options.reach))
    finally:
        if world > 1:
            distributed.destroy_process_group()
    found = {name: scale.flatten().tolist() for name, scale in scales.items()}
    if rank == 0:
        print(f"{len(scales)} scales from {len(files)} files on {world} processes")
        if options.scales:
            options.scales.write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
