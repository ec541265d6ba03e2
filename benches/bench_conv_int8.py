"""How fast is the int8 submanifold convolution on CPU, and against spconv's fp32 one?

Run by `python -m benches conv_int8 [--quick]`. Voxels are sorted by key, as `conv_output_coords`
gives them, and the pairs of the map are listed, as spconv's are (`pairs_ms`: how long that takes);
`table`, `uniform` and `signed` read the table of the map. The int8 time has the packing of the
weights in it and the whole epilogue (scale, bias, ReLU, rounding); spconv does no epilogue.
`with_map` times include the kernel map, from unsorted voxels, and read its table. Each timed run comes
right after one of its own, spconv's too, so that none pays for what another one left in the caches.

Inputs are not negative, as after a ReLU: vector paths are faster then. Weights are normal, as trained
ones nearly are: the AVX2 path is. `uniform` has weights of any size alike, `signed` inputs of both
signs, too. The peak on AVX2 is that of its faster way.
"""

import argparse
import os
import time
from typing import Any

import torch
from torch import Tensor

import fquant_kernels
from benches import harness
from fquant.testing import scenes
from fquant_kernels.conv_int8.reference import sparse_conv_int8 as reference
from fquant_kernels.kernel_map.reference import linear_keys

CHANNELS = (16, 32, 64, 128)
SUBM = ([3, 3, 3], [1, 1, 1], [1, 1, 1], [1, 1, 1])


def aten_float(features: Tensor, weight: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The usual composition: gather, matmul, add at the outputs, one tap after the other."""
    out = features.new_zeros(features.shape[0], weight.shape[0])
    for k, (rows, outputs) in enumerate(pairs):
        out.index_add_(0, outputs, features.index_select(0, rows) @ weight[:, k].T)
    return out


def spconv_layer(package: Any, weight: Tensor, coords: Tensor, features: Tensor, shape: Any) -> Any:
    """Returns a run with the rulebook cached, and one that builds it."""
    channels = weight.shape[0]
    layer = package.SubMConv3d(channels, channels, 3, bias=False, indice_key="map")
    with torch.no_grad():
        layer.weight.copy_(weight.view(channels, 3, 3, 3, channels))

    def fresh() -> Any:
        with torch.no_grad():
            return layer(package.SparseConvTensor(features, coords, list(shape), 1))

    first = fresh()

    def cached() -> Any:
        with torch.no_grad():
            return layer(first.replace_feature(features))

    return cached, fresh


def bench(scene: scenes.Scene, channels: int, peak: float, package: Any, rounds: int) -> None:
    order = linear_keys(scene.coords, scene.spatial_shape).argsort()
    coords = scene.coords[order].contiguous()
    neighbors = fquant_kernels.kernel_neighbors(coords, coords, scene.spatial_shape, *SUBM)
    num_voxels, pairs = coords.shape[0], int((neighbors >= 0).sum())
    random = torch.Generator().manual_seed(channels)
    signed = torch.randint(-128, 128, (num_voxels, channels), generator=random).to(torch.int8)
    features = signed.clamp(min=0)
    uniform = torch.randint(-128, 128, (channels, 27, channels), generator=random).to(torch.int8)
    weight = (torch.randn(uniform.shape, generator=random) * 36).round().clamp(-127, 127)
    weight = weight.to(torch.int8)
    scale = torch.rand(channels, generator=random) * 1e-3
    bias = torch.randn(channels, generator=random)

    def conv(table: Tensor, x: Tensor = features, w: Tensor = weight) -> Tensor:
        return fquant_kernels.sparse_conv_int8(x, w, table, scale, bias, relu=True)

    pairs_of_map = fquant_kernels.pair_rulebook(neighbors, num_voxels)

    def conv_pairs() -> Tensor:
        return fquant_kernels.sparse_conv_int8_pairs(
            features, weight, neighbors, pairs_of_map, scale, bias, relu=True
        )

    def with_map() -> Tensor:
        rows = scene.coords
        return conv(fquant_kernels.kernel_neighbors(rows, rows, scene.spatial_shape, *SUBM))

    real, real_weight = features.float(), weight.float()

    def conv_float() -> Tensor:
        return fquant_kernels.sparse_conv_float(real, real_weight, neighbors)

    for x, w in ((features, weight), (features, uniform), (signed, uniform)):
        want = reference(x, w, neighbors, scale, bias, relu=True)
        assert torch.equal(conv(neighbors, x, w), want)
    assert torch.equal(conv_pairs(), conv(neighbors))
    lists = [(line[line >= 0], (line >= 0).nonzero()[:, 0]) for line in neighbors]
    composed = aten_float(real, real_weight, lists)
    torch.testing.assert_close(conv_float(), composed, rtol=1e-4, atol=1e-2 * channels)
    runs: dict[str, harness.Run] = {
        "int8": conv_pairs,
        "table": lambda: conv(neighbors),
        "uniform": lambda: conv(neighbors, w=uniform),
        "signed": lambda: conv(neighbors, signed, uniform),
        "int8_with_map": with_map,
        "pairs": lambda: fquant_kernels.pair_rulebook(neighbors, num_voxels),
        "float": conv_float,
        "aten_float": lambda: aten_float(real, real_weight, lists),
    }
    if package is not None:
        cached, _ = spconv_layer(package, real_weight, coords, real, scene.spatial_shape)
        torch.testing.assert_close(cached().features, composed, rtol=1e-4, atol=1e-2 * channels)
        _, unsorted = spconv_layer(package, real_weight, scene.coords, real, scene.spatial_shape)
        runs |= {"spconv": cached, "spconv_with_map": unsorted}
    times = harness.interleaved(runs, rounds, warm=True)
    operations = 2 * pairs * channels * channels
    moved = (pairs + num_voxels) * channels + pairs * 5 + weight.numel()
    row: dict[str, Any] = {
        "scene": scene.name,
        "N": num_voxels,
        "taps": pairs / num_voxels,
        "C": channels,
        "int8_ms": times["int8"].median * 1e3,
        "spread": times["int8"].spread,
        "pairs_ms": times["pairs"].median * 1e3,
        "GOP/s": operations / times["int8"].median / 1e9,
        "GB/s": moved / times["int8"].median / 1e9,
        "share_of_peak": operations / times["int8"].median / peak,
        "float_over_aten": times["float"].ratio(times["aten_float"]),
    }
    if package is not None:
        for name in ("int8", "table", "uniform", "signed"):
            row[f"{name}_over_spconv"] = times[name].ratio(times["spconv"])
        row["float_over_spconv"] = times["float"].ratio(times["spconv"])
        row["with_map_over_spconv"] = times["int8_with_map"].ratio(times["spconv_with_map"])
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    try:
        many = harness.interleaved({"int8": runs["int8"]}, rounds, time.perf_counter)["int8"]
    finally:
        torch.set_num_threads(1)
    one = harness.interleaved({"int8": runs["int8"]}, rounds, time.perf_counter)["int8"]
    row[f"wall_speedup_{threads}_threads"] = one.median / many.median
    harness.report(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one scene, three rounds")
    parser.add_argument("--channels", type=int, nargs="*", default=list(CHANNELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    package = harness.spconv()
    peak = harness.peak()
    harness.report({**harness.machine(), "peak_GOP/s": peak / 1e9})
    chosen = [scenes.synthetic(name) for name in scenes.SENSORS]
    chosen += [scene for scene in scenes.real() if scene.coords.shape[0] > 50_000]
    for scene in chosen[:1] if options.quick else chosen:
        for channels in options.channels:
            bench(scene, channels, peak, package, 3 if options.quick else 9)


if __name__ == "__main__":
    main()
