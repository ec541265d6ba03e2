"""Whole networks on CPU: int8 as planned and float32, against spconv's float32, rulebooks included.

The networks are those of `fquant.sparse.models`, listed by `fquant.sparse_network.list_layers`;
which layers run in int8 is `choose_int8`'s choice, and is printed. Weights are random and uniform:
time depends on them on AVX2 alone, where normal ones are up to 24 % faster. The int8 network is
compared with its fake quantization before anything is timed. spconv runs its best CPU algorithm
(Native), without bias, because its CPU code refuses one; ours adds bias, ReLU, residual and
requantizes.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fquant as fq
from benches import harness
from fquant.sparse import SparseTensor, models
from fquant.sparse_network import (
    Deployed,
    Layer,
    SparseNetwork,
    choose_int8,
    describe_choices,
    int8_network,
    int8_rules,
    list_layers,
    make_maps,
    measured_times,
    tie_scales,
    to_int8,
)
from fquant.sparse_network.maps import geometries
from fquant.testing import scenes

# Name: the model, its input channels, the scene, and the least grid it is used with.
NETWORKS: dict[str, tuple[Any, int, str, tuple[int, int, int]]] = {
    "BenchmarkNet": (models.BenchmarkNet, 3, "nuscenes", (80, 1600, 1600)),
    "VoxelBackBone8x": (models.VoxelBackBone8x, 4, "waymo", (41, 1504, 1504)),
    "VoxelResBackBone8x": (models.VoxelResBackBone8x, 5, "nuscenes", (41, 1440, 1440)),
    "MinkUNet": (models.MinkUNet, 4, "kitti", (16, 16, 16)),
}


def spconv_network(layers: Sequence[Layer], package: Any, x: SparseTensor) -> Callable[[], Tensor]:
    """Returns a run of the same layers by spconv, which shares rulebooks where ours are shared."""
    found = geometries(layers)
    options = {"bias": False, "algo": package.ConvAlgo.Native}
    modules: dict[str, Any] = {}
    for layer in layers:
        cin, cout = layer.channels
        if layer.name in found:
            key = found[layer.undoes].key if layer.undoes else found[layer.name].key
        if layer.op == "subm":
            module = package.SubMConv3d(cin, cout, layer.kernel_size, indice_key=key, **options)
        elif layer.op == "conv":
            sizes = (layer.kernel_size, layer.stride, layer.padding)
            module = package.SparseConv3d(cin, cout, *sizes, indice_key=key, **options)
        elif layer.op == "inverse":
            module = package.SparseInverseConv3d(
                cin, cout, layer.kernel_size, indice_key=key, **options
            )
        elif layer.op == "max_pool":
            module = package.SparseMaxPool3d(
                layer.kernel_size, layer.stride, algo=package.ConvAlgo.Native
            )
        else:
            module = torch.nn.Linear(cin, cout)
        modules[layer.name] = module

    def forward() -> Tensor:
        values = {
            "input": package.SparseConvTensor(
                x.features, x.coords, list(x.spatial_shape), x.batch_size
            )
        }
        with torch.no_grad():
            for layer in layers:
                read = values[layer.inputs[0]]
                if len(layer.inputs) > 1:
                    joined = torch.cat([values[name].features for name in layer.inputs], dim=1)
                    read = read.replace_feature(joined)
                if layer.op == "linear":
                    y = read.replace_feature(modules[layer.name](read.features))
                else:
                    y = modules[layer.name](read)
                features = y.features
                if layer.residual:
                    features = features + values[layer.residual].features
                if layer.relu:
                    features = features.relu()
                values[layer.name] = y.replace_feature(features)
        return values[layers[-1].name].features

    return forward


def bench(name: str, package: Any, rounds: int, repeats: int) -> None:
    make, channels, scan, least = NETWORKS[name]
    scene = scenes.synthetic(scan)
    z, y, x_size = (max(pair) for pair in zip(scene.spatial_shape, least, strict=True))
    g = torch.Generator().manual_seed(1)
    features = torch.randn(scene.coords.shape[0], channels, generator=g)
    x = SparseTensor(features, scene.coords, (z, y, x_size), 1)

    torch.manual_seed(0)
    model = make(in_channels=channels).eval()
    listed = list_layers(model)
    layers, params = listed.layers, listed.params(model.state_dict())
    choices = choose_int8(layers, measured_times()[1])
    int8 = frozenset(choice.layer for choice in choices if choice.int8)
    print(f"\n{name}\n{describe_choices(choices)}")

    maps = make_maps(layers, x)
    network = SparseNetwork(layers, batch_norm=False)
    plan = fq.make_plan(network, int8_rules(layers, int8), (x, maps))
    stats = fq.calibrate_model(network, plan, params, [(x, maps)], progress=False)
    scales = tie_scales(layers, int8, fq.finalize(plan, stats))
    deployed = to_int8(layers, int8, params, scales)
    in_int8, in_float = int8_network(layers, int8), int8_network(layers, frozenset())
    float_params = Deployed(params, {})
    with torch.no_grad():
        want = fq.fake_quant(network, plan)(params, scales, x, maps).features
        got = in_int8(deployed, x, maps).features
        close = torch.isclose(got, want, rtol=0, atol=0.02 * float(want.abs().max()))
        assert close.double().mean() > 0.999, f"{name}: int8 differs from its fake quantization"

    def forward(network: Any, record: Deployed, maps: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                read = maps or make_maps(layers, x, pairs=network is in_int8)
                return network(record, x, read).features

        return run

    runs: dict[str, harness.Run] = {
        "int8": forward(in_int8, deployed, make_maps(layers, x, pairs=True)),
        "int8_with_rulebooks": forward(in_int8, deployed, None),
        "float": forward(in_float, float_params, maps),
        "float_with_rulebooks": forward(in_float, float_params, None),
        "rulebooks": lambda: make_maps(layers, x),
    }
    if package is not None:
        runs["spconv"] = spconv_network(layers, package, x)
    times = harness.interleaved(runs, rounds)
    keys = {layer: geometry.key for layer, geometry in geometries(layers).items()}
    operations = sum(
        2 * int((maps[keys[c.name]].neighbors >= 0).sum()) * c.channels[0] * c.channels[1]
        for c in layers
        if c.is_convolution
    )
    row: dict[str, Any] = {
        "network": name,
        "scene": scene.name,
        "voxels": scene.coords.shape[0],
        "convolutions": sum(layer.is_convolution for layer in layers),
        "in_int8": len(int8),
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
    wall = []
    for _ in range(repeats):
        start = time.perf_counter()
        runs["int8_with_rulebooks"]()
        wall.append(1e3 * (time.perf_counter() - start))
    p50, p95, p99 = np.percentile(wall, [50, 95, 99]).tolist()
    row |= {"wall_p50_ms": p50, "wall_p95_ms": p95, "wall_p99_ms": p99, "wall_runs": repeats}
    harness.report(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(NETWORKS), help="networks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=20, help="for the percentiles")
    options = parser.parse_args()
    torch.set_num_threads(1)
    package = harness.spconv()
    harness.report(harness.machine())
    for name in options.names:
        bench(name, package, options.rounds, options.repeats)


if __name__ == "__main__":
    main()
