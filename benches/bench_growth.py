"""Time of one layer against the number of voxels, 1,000 to 1,000,000: rulebook, int8, float32.

A submanifold layer of 64 channels and 3 x 3 x 3 taps on the first N voxels of one scan-like cloud,
with spconv's rulebook and layer where it is installed. `--picture FILE` draws it (matplotlib).
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import fquant_kernels
from benches import harness
from benches.bench_kernel_map import SUBM
from fquant.testing import scenes
from fquant_kernels.conv_int8.reference import sparse_conv_int8 as reference

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
CHANNELS = 64
LABELS = {
    "rulebook": "rulebook",
    "int8": "int8 layer",
    "float": "float32 layer",
    "spconv_rulebook": "spconv rulebook",
    "spconv_float": "spconv float32 layer",
}


def spconv_runs(package: Any, part: scenes.Scene, features: torch.Tensor) -> dict[str, harness.Run]:
    from spconv.pytorch import ops

    algo = package.ConvAlgo.Native
    shape = list(part.spatial_shape)
    module = package.SubMConv3d(CHANNELS, CHANNELS, 3, bias=False, indice_key="k", algo=algo)
    x = package.SparseConvTensor(features, part.coords, shape, 1)
    with torch.no_grad():
        x = module(x).replace_feature(features)  # the rulebook travels with the tensor

    def layer() -> None:
        with torch.no_grad():
            module(x)

    return {
        "spconv_rulebook": lambda: ops.get_indice_pairs(
            part.coords, 1, shape, algo, *SUBM, [0, 0, 0], True
        ),
        "spconv_float": layer,
    }


def bench(cloud: scenes.Scene, size: int, package: Any, rounds: int) -> dict[str, Any]:
    part = scenes.Scene(f"first-{size}", cloud.coords[:size].contiguous(), cloud.spatial_shape)
    g = torch.Generator().manual_seed(0)
    features = torch.randint(-128, 128, (size, CHANNELS), dtype=torch.int8, generator=g)
    weight = torch.randint(-128, 128, (CHANNELS, 27, CHANNELS), dtype=torch.int8, generator=g)
    scale = torch.full((CHANNELS,), 1e-4)

    def rulebook() -> torch.Tensor:
        return fquant_kernels.kernel_neighbors(part.coords, part.coords, part.spatial_shape, *SUBM)

    table = rulebook()
    rows = table[:, :1000].contiguous()
    y = fquant_kernels.sparse_conv_int8(features, weight, table, scale)
    assert torch.equal(y[:1000], reference(features, weight, rows, scale))
    floats, float_weight = features.float(), weight.float()
    runs: dict[str, harness.Run] = {
        "rulebook": rulebook,
        "int8": lambda: fquant_kernels.sparse_conv_int8(features, weight, table, scale),
        "float": lambda: fquant_kernels.sparse_conv_float(floats, float_weight, table),
    }
    if package is not None:
        runs |= spconv_runs(package, part, floats)
    times = harness.interleaved(runs, rounds)
    row: dict[str, Any] = {"N": size, "taps": int((table >= 0).sum()) / size}
    return row | {f"{name}_ms": timing.median * 1e3 for name, timing in times.items()}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    sizes = [row["N"] for row in rows]
    for name, label in LABELS.items():
        if f"{name}_ms" in rows[0]:
            style = "--" if name.startswith("spconv") else "-"
            axes.loglog(sizes, [row[f"{name}_ms"] for row in rows], style, marker="o", label=label)
    axes.set_xlabel("active voxels")
    axes.set_ylabel("milliseconds, one core")
    axes.set_title(f"submanifold 3x3x3, {CHANNELS} channels", fontsize=10)
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="file to draw into")
    parser.add_argument("--quick", action="store_true", help="up to 10,000 voxels, three rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    package = harness.spconv()
    harness.report(harness.machine())
    sizes = SIZES[:3] if options.quick else SIZES
    cloud = scenes.of_size(sizes[-1])
    rows = [bench(cloud, size, package, 3 if options.quick else 7) for size in sizes]
    for row in rows:
        harness.report(row)
    if options.picture is not None:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
