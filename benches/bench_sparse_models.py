"""Whole float networks on CPU: `fquant.sparse.models` against the same in spconv, rulebooks included.

Both run as modules in eval mode under `torch.no_grad`, with the same parameters, from coordinates and
features alone. The results are compared before anything is timed. spconv runs its CPU algorithm.
"""

import argparse
import dataclasses
from typing import Any

import torch

from benches import harness, networks, scenes
from fquant.sparse import SparseTensor, models, nn

MODELS = {
    "benchmark_net": models.BenchmarkNet,
    "VoxelBackBone8x": models.VoxelBackBone8x,
    "VoxelResBackBone8x": lambda: models.VoxelResBackBone8x(
        block_bias=False
    ),  # spconv: none on CPU
    "MinkUNet": models.MinkUNet,
}


def bench(name: str, package: Any, rounds: int) -> None:
    _, scan, least = networks.NETWORKS[name]
    scene = scenes.synthetic(scan)
    z, y, x = (max(pair) for pair in zip(scene.spatial_shape, least, strict=True))
    scene = dataclasses.replace(scene, spatial_shape=(z, y, x))
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    first = next(m for m in model.modules() if isinstance(m, nn.SparseConvolution))
    features = torch.randn(scene.coords.shape[0], first.in_channels)
    cells = SparseTensor(features, scene.coords, scene.spatial_shape, 1)
    prepared = nn.with_maps(model, cells)
    runs: dict[str, harness.Run] = {
        "float_with_rulebooks": lambda: model(cells),
        "float": lambda: model(prepared),
        "rulebooks": lambda: nn.with_maps(model, cells),
    }
    row: dict[str, Any] = {"network": name, "scene": scene.name, "voxels": len(features)}
    with torch.no_grad():
        if package is not None:
            from benches.spconv_networks import to_spconv_modules

            theirs = to_spconv_modules(model, package)

            def run_theirs() -> Any:
                shape = list(scene.spatial_shape)
                return theirs(package.SparseConvTensor(features, scene.coords, shape, 1))

            row["difference"] = compare(model(cells), run_theirs())
            runs["spconv"] = run_theirs
        times = harness.interleaved(runs, rounds)
    for variant, timing in times.items():
        row[f"{variant}_ms"] = timing.median * 1e3
    if package is not None:
        row["float_over_spconv"] = times["float_with_rulebooks"].ratio(times["spconv"])
    harness.report(row)


def compare(ours: Any, theirs: Any) -> float:
    """Returns the largest difference over the largest value, after checking the cells."""
    mine, other = (_by_key(t) for t in (ours, theirs))
    assert torch.equal(mine[0], other[0]), "other cells than spconv's"
    largest = other[1].abs().max()
    difference = ((mine[1] - other[1]).abs().max() / largest).item()
    assert difference < 1e-3, f"differs from spconv by {difference} of the largest value"
    return difference


def _by_key(x: Any) -> tuple[torch.Tensor, torch.Tensor]:
    key = x.indices[:, 0].long()
    for axis, size in enumerate(x.spatial_shape):
        key = key * int(size) + x.indices[:, 1 + axis]
    key, order = key.sort()
    return key, x.features[order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(MODELS), help="networks")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    package = harness.spconv()
    harness.report(harness.machine())
    for name in options.names:
        bench(name, package, 2 if options.quick else 5)


if __name__ == "__main__":
    main()
