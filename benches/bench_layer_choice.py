"""Where does int8 pay? One layer at a time against float32, for `sparse_network.choose_int8`.

`python -m benches layer_choice --write fquant/sparse_network/layer_times.json` renews, in the table
that ships, the times of the instruction set in use (`FQUANT_CPU_ISA`). The int8 time has residual,
ReLU and rounding in it; the float32 time has residual and ReLU. Inputs are not negative, as after a
ReLU.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

import fquant_kernels
from benches import harness
from fquant.testing import scenes
from fquant_kernels import native
from fquant_kernels.conv_int8.reference import sparse_conv_int8 as reference

VOXELS = 20_000
CHANNELS = (
    *((4, 16), (4, 32), (4, 64), (16, 4), (32, 4), (64, 4)),
    *((8, 8), (16, 16), (16, 32), (32, 16), (32, 32), (32, 64), (64, 32)),
    *((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128), (256, 256)),
)
# A submanifold convolution in three and two dimensions, the two common ones that halve the grid, 1 x 1.
GEOMETRIES = (
    ((3, 3, 3), 1, (1, 1, 1)),
    ((1, 3, 3), 1, (0, 1, 1)),
    ((2, 2, 2), 2, (0, 0, 0)),
    ((1, 1, 1), 1, (0, 0, 0)),
)


def time_layer(neighbors: torch.Tensor, rows: int, cin: int, cout: int, rounds: int) -> list[float]:
    """Returns nanoseconds per output row, of int8 and of float32."""
    random = torch.Generator().manual_seed(cin * 1000 + cout)
    taps, outputs = neighbors.shape
    x = torch.randint(0, 128, (rows, cin), generator=random).to(torch.int8)
    weight = torch.randint(-127, 128, (cout, taps, cin), generator=random).to(torch.int8)
    residual = torch.randint(-127, 128, (outputs, cout), generator=random).to(torch.int8)
    scale = torch.full((cout,), 0.01 / math.sqrt(taps * cin))
    bias, beta = torch.randn(cout, generator=random), torch.tensor(0.5)
    x32, weight32, residual32 = x.float(), weight.float(), residual.float()

    def int8() -> torch.Tensor:
        return fquant_kernels.sparse_conv_int8(
            x, weight, neighbors, scale, bias, residual, beta, True
        )

    def float32() -> torch.Tensor:
        y = fquant_kernels.sparse_conv_float(x32, weight32, neighbors, bias)
        return y.add_(residual32).relu_()

    part = neighbors[:, :500].contiguous()
    want = reference(x, weight, part, scale, bias, residual[:500], beta, True)
    assert torch.equal(int8()[:500], want)
    times = harness.interleaved({"int8": int8, "float32": float32}, rounds)
    return [1e9 * times[name].median / outputs for name in ("int8", "float32")]


def as_json(tables: dict[str, Any]) -> str:
    """Returns the tables, one layer a line."""
    parts = []
    for isa, table in sorted(tables.items()):
        rows = ",\n".join(f"      {json.dumps(row)}" for row in table["times"])
        machine = json.dumps(table["machine"])
        parts.append(
            f'  "{isa}": {{\n    "machine": {machine},\n    "times": [\n{rows}\n    ]\n  }}'
        )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="where to put the table, as JSON")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scene = scenes.of_size(VOXELS)
    machine = harness.machine()
    harness.report(machine)
    times = []
    for kernel, stride, padding in GEOMETRIES:
        geometry = (kernel, (stride,) * 3, padding, (1, 1, 1))
        coords, shape = scene.coords, scene.spatial_shape
        out = coords
        if stride > 1:
            out = fquant_kernels.conv_output_coords(coords, shape, *geometry)
        neighbors = fquant_kernels.kernel_neighbors(coords, out, shape, *geometry)
        for cin, cout in CHANNELS:
            row = time_layer(neighbors, len(coords), cin, cout, 3 if options.quick else 9)
            times.append([math.prod(kernel), cin, cout, *(round(t, 1) for t in row)])
            harness.report(
                {
                    "taps": math.prod(kernel),
                    "active": float((neighbors >= 0).sum() / neighbors.shape[1]),
                    "channels": [cin, cout],
                    "int8_ns": row[0],
                    "float32_ns": row[1],
                    "float32_over_int8": row[1] / row[0],
                }
            )
    if options.write:
        kept = {name: machine[name] for name in ("cpu", "threads", "torch")}
        isa = native.chosen_isa()
        tables = json.loads(options.write.read_text()) if options.write.exists() else {}
        tables[isa] = {"machine": {**kept, "isa": isa, "scene": scene.name}, "times": times}
        options.write.write_text(as_json(tables))


if __name__ == "__main__":
    main()
