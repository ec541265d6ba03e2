"""`python3 -m benches.gpu`: checks the CUDA kernels bit for bit, then times them; writes one JSON.

Needs an NVIDIA GPU of compute capability 8.0 or newer, torch and Triton, and nothing installed:
`make gpu`, or `PYTHONPATH=.:kernels python3 -m benches.gpu`. `--dry-run` goes through all but the
GPU, with the kernels interpreted on a tiny scene, and writes the JSON without a time in it.

Times are medians of CUDA events over rounds that run each way once, in turn, with a cold L2 (a
buffer of four times its size is written before each run). TOP/s counts the active pairs alone.
"""

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:  # Triton reads this when it is imported, which torch does by itself
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from benches.gpu_layers import KERNEL, ONE, check, make_layer, ways
from fquant.testing.scenes import Scene, of_size
from fquant_kernels import kernel_neighbors, mask_order, tile_rulebook
from fquant_kernels.triton_support import why_unavailable
from tests.kernels.triton_cases import CHECKS

RESULTS = Path(__file__).parent / "results"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benches.gpu", description="CUDA checks and benches.")
    parser.add_argument("--channels", type=int, nargs="+", help="16 32 64 128 256")
    parser.add_argument("--voxels", type=int, nargs="+", help="50000 100000 300000 1000000")
    parser.add_argument("--tile-rows", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cases", type=int, help="random checks of each kernel (200)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--tune", action="store_true", help="time every candidate configuration")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: everything but the times")
    options = parser.parse_args(arguments)
    dry = options.dry_run
    options.channels = options.channels or ([16, 24] if dry else [16, 32, 64, 128, 256])
    options.voxels = options.voxels or ([150] if dry else [50_000, 100_000, 300_000, 1_000_000])
    options.cases = options.cases or (5 if dry else 200)
    return options


def environment() -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "command": " ".join(["python3 -m benches.gpu", *sys.argv[1:]]),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["l2_bytes"] = properties.L2_cache_size
        found["cuda"] = torch.version.cuda
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.check_output(query, text=True).split("\n")[0].strip()
    return found


def measure(runs: dict[str, Any], rounds: int, dry_run: bool) -> dict[str, dict[str, float]]:
    """Interleaved times in milliseconds, after one run of each that compiles it."""
    if dry_run:
        for run in runs.values():
            run()
        return {name: {} for name in runs}
    flush = torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8)
    flush = flush.cuda()
    times: dict[str, list[Any]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            run()
            end.record()
            times[name].append((begin, end))
    torch.cuda.synchronize()
    result = {}
    for name, events in times.items():
        values = [begin.elapsed_time(end) for begin, end in events]
        low, median, high = statistics.quantiles(values, n=4)
        result[name] = {"ms": median, "ms_quartile_1": low, "ms_quartile_3": high}
    return result


def plan_runs(scene: Scene, neighbors: torch.Tensor, tile_rows: int) -> dict[str, Any]:
    """What is computed once per resolution, not per layer."""
    from fquant_kernels.kernel_map import cuda_triton, reference

    geometry = (scene.spatial_shape, KERNEL, ONE, ONE, ONE)
    order = mask_order(neighbors)
    coords = scene.coords.to(neighbors.device)
    return {
        "kernel map, Triton": lambda: cuda_triton.kernel_neighbors(coords, coords, *geometry),
        "kernel map, torch": lambda: reference.kernel_neighbors(coords, coords, *geometry),
        "rulebook, Triton": lambda: cuda_triton.tile_rulebook(neighbors, tile_rows),
        "rulebook, Triton, mask-sorted": lambda: cuda_triton.tile_rulebook(
            neighbors, tile_rows, order
        ),
        "rulebook, torch, compact": lambda: tile_rulebook(neighbors, tile_rows),
        "mask order": lambda: mask_order(neighbors),
    }


def bench_scene(num_voxels: int, options: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    scene = of_size(num_voxels)
    coords = scene.coords.to(device)
    neighbors = kernel_neighbors(coords, coords, scene.spatial_shape, KERNEL, ONE, ONE, ONE)
    pairs = int((neighbors >= 0).sum())
    order = mask_order(neighbors)
    waste = {
        f"{rows}{name}": tile_rulebook(neighbors, rows, by).rows.shape[0] * rows / max(pairs, 1)
        for rows in options.tile_rows
        for name, by in (("", None), (" mask-sorted", order))
    }
    about = {"voxels": num_voxels, "taps": pairs / num_voxels, "computed_per_active_pair": waste}
    print(json.dumps(about), flush=True)
    rows = []
    plans = plan_runs(scene, neighbors, options.tile_rows[-1])
    for name, numbers in measure(plans, options.rounds, options.dry_run).items():
        rows.append({**about, "plan": name, **numbers})
        show(rows[-1])
    for channels in options.channels:
        layer = make_layer(neighbors, num_voxels, channels)
        found = ways(layer, scene, options.tile_rows, options.tune)
        failed = {name: check(name, way) for name, way in found.items()}
        good = {name: way.run for name, way in found.items() if failed[name] is None}
        measured = measure(good, options.rounds, options.dry_run)
        for name, why in failed.items():
            row = {**about, "channels": channels, "way": name}
            if why is not None:
                row["left_out"] = why
            elif measured[name]:
                row.update(measured[name])
                row["top_per_s"] = 2e-9 * pairs * channels**2 / row["ms"]
                row["gb_per_s"] = 1e-6 * found[name].bytes_moved / row["ms"]
            rows.append(row)
            show(row)
    return rows


def show(row: dict[str, Any]) -> None:
    numbers = [
        f"{row[key]:9.3f} {unit}" if key in row else ""
        for key, unit in (("ms", "ms"), ("top_per_s", "TOP/s"), ("gb_per_s", "GB/s"))
    ]
    what = row.get("plan") or f"C {row['channels']:3d} {row['way']}"
    print(f"  {what:50s}", *numbers, row.get("left_out", ""), flush=True)


def run_checks(cases: int, device: str) -> dict[str, int]:
    for name, check_case in CHECKS.items():
        for seed in range(cases):
            check_case(seed, device)
        print(f"{name}: {cases} random cases equal the reference", flush=True)
    return dict.fromkeys(CHECKS, cases)


def write(result: dict[str, Any], folder: Path) -> Path:
    """Writes the JSON under a name of the GPU and the time; never over an older one."""
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", result["environment"].get("gpu", "dry-run")).lower()
    stamp = re.sub(r"[^0-9]", "", result["environment"]["date"][:19])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu_{gpu}_{stamp}.json"
    with open(path, "x", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    return path


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if not options.dry_run:
        reason = why_unavailable()
        if reason is not None:
            raise SystemExit(f"benches.gpu: {reason}. --dry-run does without a GPU.")
    result: dict[str, Any] = {"environment": environment(), "dry_run": options.dry_run}
    print(json.dumps(result["environment"]), flush=True)
    device = "cpu" if options.dry_run else "cuda"
    result["checks"] = run_checks(options.cases, device)
    result["rows"] = []
    for num_voxels in options.voxels:
        result["rows"] += bench_scene(num_voxels, options, device)
    print(f"wrote {os.path.relpath(write(result, options.output))}")


if __name__ == "__main__":
    main(sys.argv[1:])
