"""Whole networks on CPU: int8 and float32 kernels against spconv's float32, rulebooks included.

Weights are random: time does not depend on them. The int8 and float kernels are compared with the
reference layer by layer before anything is timed. spconv runs its best CPU algorithm (Native),
without bias, because its CPU code refuses one; ours adds bias, ReLU, residual and requantizes.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fquant_kernels
from benches import harness, networks
from fquant.testing import scenes
from benches.networks import Step
from fquant_kernels.conv_int8.reference import sparse_conv_int8 as int8_reference
from fquant_kernels.kernel_map import conv_output_shape

ONES = (1, 1, 1)


class Level:
    """Cells of one resolution with the maps built on them, as a network reuses them."""

    def __init__(self, coords: Tensor, shape: tuple[int, ...], parent: Any = None) -> None:
        self.coords, self.shape, self.parent = coords, shape, parent
        self.submanifold: dict[tuple[int, ...], Tensor] = {}
        self.from_parent: Tensor | None = None

    def subm(self, kernel: tuple[int, ...]) -> Tensor:
        if kernel not in self.submanifold:
            padding = [k // 2 for k in kernel]
            self.submanifold[kernel] = fquant_kernels.kernel_neighbors(
                self.coords, self.coords, self.shape, kernel, ONES, padding, ONES
            )
        return self.submanifold[kernel]

    def down(self, step: Step) -> "Level":
        geometry = (step.kernel, step.stride, step.padding, ONES)
        out = fquant_kernels.conv_output_coords(self.coords, self.shape, *geometry)
        level = Level(out, conv_output_shape(self.shape, *geometry), self)
        level.from_parent = fquant_kernels.kernel_neighbors(self.coords, out, self.shape, *geometry)
        return level


class Plan:
    """Every step's kernel map, in order; building it is the rulebook time."""

    def __init__(self, steps: list[Step], scene: scenes.Scene) -> None:
        level = Level(scene.coords, scene.spatial_shape)
        self.maps: list[Tensor | None] = []
        self.rows: list[int] = []
        for step in steps:
            table = None
            if step.kind == "subm":
                table = level.subm(step.kernel)
            elif step.kind in ("conv", "pool"):
                level = level.down(step)
                table = level.from_parent
            elif step.kind == "inverse":
                parent = level.parent
                table = fquant_kernels.transpose_neighbors(
                    level.from_parent, parent.coords.shape[0]
                )
                level = parent
            self.maps.append(table)
            self.rows.append(level.coords.shape[0])


Conv = Callable[[Tensor, int, Step, Tensor, Tensor | None], Tensor]


def run(steps: list[Step], plan: Plan, x: Tensor, conv: Conv) -> Tensor:
    """Returns the features after the last step; `conv` runs one convolution."""
    kept: dict[str, Tensor] = {}
    for i, step in enumerate(steps):
        table = plan.maps[i]
        if step.kind == "keep":
            kept[step.name] = x
        elif step.kind == "back":
            x = kept[step.name]
        elif step.kind == "concat":
            x = torch.cat([x, kept[step.name]], dim=1)
        elif step.kind == "pool":
            assert table is not None
            low = torch.iinfo(x.dtype).min if x.dtype == torch.int8 else float("-inf")
            y = torch.full((plan.rows[i], x.shape[1]), low, dtype=x.dtype)
            padded = torch.cat([x, torch.full((1, x.shape[1]), low, dtype=x.dtype)])
            for tap in torch.where(table < 0, x.shape[0], table):
                y = torch.maximum(y, padded[tap])
            x = y
        else:
            assert table is not None
            x = conv(x, i, step, table, kept[step.add] if step.add else None)
    return x


def int8_conv(steps: list[Step], implementation: Callable[..., Tensor]) -> Conv:
    g = torch.Generator().manual_seed(0)
    parameters = {}
    for i, step in enumerate(steps):
        if step.channels[0]:
            cin, cout = step.channels
            taps = step.kernel[0] * step.kernel[1] * step.kernel[2]
            weight = torch.randint(-127, 128, (cout, taps, cin), dtype=torch.int8, generator=g)
            scale = torch.full((cout,), 0.02 / (taps * cin) ** 0.5)
            parameters[i] = (weight, scale, torch.rand(cout, generator=g))
    beta = torch.tensor(0.9)

    def conv(x: Tensor, i: int, step: Step, table: Tensor, residual: Tensor | None) -> Tensor:
        weight, scale, bias = parameters[i]
        return implementation(
            x,
            weight,
            table,
            scale,
            bias,
            residual,
            None if residual is None else beta,
            step.relu,
            torch.int8,
        )

    return conv


def float_conv(steps: list[Step]) -> Conv:
    g = torch.Generator().manual_seed(0)
    weights = {}
    for i, step in enumerate(steps):
        if step.channels[0]:
            cin, cout = step.channels
            taps = step.kernel[0] * step.kernel[1] * step.kernel[2]
            weights[i] = torch.randn(cout, taps, cin, generator=g) / (taps * cin) ** 0.5

    def conv(x: Tensor, i: int, step: Step, table: Tensor, residual: Tensor | None) -> Tensor:
        y = fquant_kernels.sparse_conv_float(x, weights[i], table)
        y = y if residual is None else y.add_(residual)
        return y.relu_() if step.relu else y

    return conv


def spconv_network(steps: list[Step], package: Any, scene: scenes.Scene) -> Callable[[], Tensor]:
    """Returns a run of the same layers by spconv, rulebooks built as its indice keys say."""
    modules: list[Any] = []
    level, opened = 0, [0]
    for i, step in enumerate(steps):
        cin, cout = step.channels
        algo = package.ConvAlgo.Native
        common = {"bias": False, "algo": algo}
        if step.kind == "subm":
            key = f"subm{level}-{step.kernel}"
            module = package.SubMConv3d(cin, cout, list(step.kernel), indice_key=key, **common)
        elif step.kind == "conv":
            module = package.SparseConv3d(
                cin,
                cout,
                list(step.kernel),
                list(step.stride),
                list(step.padding),
                indice_key=f"down{i}",
                **common,
            )
            opened.append(i)
            level = 100 + i
        elif step.kind == "inverse":
            down = opened.pop()
            module = package.SparseInverseConv3d(
                cin, cout, list(step.kernel), indice_key=f"down{down}", **common
            )
            level = 0 if len(opened) == 1 else 100 + opened[-1]
        elif step.kind == "pool":
            module = package.SparseMaxPool3d(list(step.kernel), list(step.stride), algo=algo)
            level = 100 + i
        else:
            module = None
        modules.append(module)
    first = next(step.channels[0] for step in steps if step.channels[0])
    features = torch.randn(scene.coords.shape[0], first)

    def forward() -> Tensor:
        kept: dict[str, Tensor] = {}
        shape = list(scene.spatial_shape)
        x = package.SparseConvTensor(features, scene.coords, shape, 1)
        with torch.no_grad():
            for step, module in zip(steps, modules, strict=True):
                if step.kind == "keep":
                    kept[step.name] = x.features
                elif step.kind == "back":
                    x = x.replace_feature(kept[step.name])
                elif step.kind == "concat":
                    x = x.replace_feature(torch.cat([x.features, kept[step.name]], dim=1))
                else:
                    x = module(x)
                    if step.kind != "pool":
                        y = x.features
                        y = y + kept[step.add] if step.add else y
                        x = x.replace_feature(y.relu() if step.relu else y)
        return x.features

    return forward


def bench(name: str, package: Any, rounds: int) -> None:
    make, scan, least = networks.NETWORKS[name]
    steps, scene = make(), scenes.synthetic(scan)
    z, y, x = (max(pair) for pair in zip(scene.spatial_shape, least, strict=True))
    scene = dataclasses.replace(scene, spatial_shape=(z, y, x))
    plan = Plan(steps, scene)
    first = next(step.channels[0] for step in steps if step.channels[0])
    g = torch.Generator().manual_seed(1)
    integers = torch.randint(-50, 50, (scene.coords.shape[0], first), dtype=torch.int8, generator=g)
    floats = torch.randn(scene.coords.shape[0], first, generator=g)

    ours = int8_conv(steps, fquant_kernels.sparse_conv_int8)

    def checked(x: Tensor, i: int, step: Step, table: Tensor, residual: Tensor | None) -> Tensor:
        y = ours(x, i, step, table, residual)
        rows = slice(0, 2000)  # the reference works in float64: some rows of every layer
        part = int8_conv_reference(
            x, i, step, table[:, rows].contiguous(), None if residual is None else residual[rows]
        )
        assert torch.equal(y[rows], part), f"{name}: step {i} differs from the reference"
        return y

    int8_conv_reference = int8_conv(steps, int8_reference)
    run(steps, plan, integers, checked)

    in_float = float_conv(steps)
    runs: dict[str, harness.Run] = {
        "int8": lambda: run(steps, plan, integers, ours),
        "int8_with_rulebooks": lambda: run(steps, Plan(steps, scene), integers, ours),
        "float": lambda: run(steps, plan, floats, in_float),
        "float_with_rulebooks": lambda: run(steps, Plan(steps, scene), floats, in_float),
        "rulebooks": lambda: Plan(steps, scene),
    }
    if package is not None:
        runs["spconv"] = spconv_network(steps, package, scene)
    times = harness.interleaved(runs, rounds)
    operations = sum(
        2 * int((table >= 0).sum()) * step.channels[0] * step.channels[1]
        for step, table in zip(steps, plan.maps, strict=True)
        if table is not None and step.channels[0]
    )
    row: dict[str, Any] = {
        "network": name,
        "scene": scene.name,
        "voxels": scene.coords.shape[0],
        "convolutions": sum(step.channels[0] > 0 for step in steps),
        "GOP": operations / 1e9,
    }
    for variant, timing in times.items():
        row[f"{variant}_ms"] = timing.median * 1e3
    row["int8_GOP/s"] = operations / 1e9 / times["int8"].median
    row["int8_of_peak"] = operations / times["int8"].median / harness.peak()
    row["int8_over_float"] = times["int8_with_rulebooks"].ratio(times["float_with_rulebooks"])
    if package is not None:
        row["int8_over_spconv"] = times["int8_with_rulebooks"].ratio(times["spconv"])
        row["float_over_spconv"] = times["float_with_rulebooks"].ratio(times["spconv"])
    harness.report(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(networks.NETWORKS), help="networks")
    parser.add_argument("--quick", action="store_true", help="one round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    package = harness.spconv()
    harness.report(harness.machine())
    for name in options.names:
        bench(name, package, 2 if options.quick else 5)


if __name__ == "__main__":
    main()
