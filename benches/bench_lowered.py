"""Lowered programs against float: a CNN and an MLP under the same torch.compile, a sparse backbone.

Answers are checked first: the compiled int8 program equals the eager one bit for bit, and its integers
are those of the Q/DQ graph but for one step in at most one of a thousand. `float_share_of_peak` is of
the processor's float32 multiply-accumulate rate. On AVX2 without VNNI an exact integer product
(vpmaddwd, 16 a step) has twice the rate of a float one (8 a step), which bounds the ratio there.
"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn

import fquant as fq
from benches import harness
from benches.bench_networks import NETWORKS, spconv_network
from fquant.graph import dynamic_rows, site_integers
from fquant.sparse import SparseTensor
from fquant.sparse_network import (
    Deployed,
    SparseNetwork,
    choose_int8,
    int8_network,
    int8_rules,
    list_layers,
    make_maps,
    measured_times,
    tie_scales,
    to_int8,
)
from fquant.testing import scenes


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
        self.second = nn.Conv2d(cout, cout, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(cout), nn.BatchNorm2d(cout)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.first(x)).relu()
        return self.norms[1](self.second(x)).relu()


def cnn() -> nn.Module:
    body = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU()]
    for cin, cout in ((32, 64), (64, 128), (128, 256)):
        body += [Block(cin, cout), nn.MaxPool2d(2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def mlp() -> nn.Module:
    widths = (784, 2048, 2048, 2048)
    body = [
        part
        for i in range(len(widths) - 1)
        for part in (nn.Linear(widths[i], widths[i + 1]), nn.ReLU())
    ]
    return nn.Sequential(*body, nn.Linear(2048, 10))


DENSE = {"cnn": (cnn, (32, 3, 64, 64)), "mlp": (mlp, (32, 784))}


def lowered(
    model: nn.Module, args: tuple[Any, ...], rules: Any, params: Any, **options: Any
) -> tuple[Any, Any]:
    """Returns the Q/DQ program and the int8 program, with scales from the arguments themselves."""
    plan = fq.make_plan(model, rules, args)
    stats = fq.calibrate_model(model, plan, params, [args], progress=False)
    qstate = fq.finalize(plan, stats)
    program = fq.export_qdq(model, plan, params, qstate, args, weights="integer", **options)
    result, report = fq.lower(program)
    assert all(layer.kernel for layer in report.layers), report
    before = site_integers(program, *args)
    for name, q in site_integers(result, *args, given=before).items():
        steps = (q.int() - before[name].int()).abs()
        assert steps.max() <= 1, name
        assert (steps > 0).float().mean() <= 1e-3, name
    return program, result


def multiplications(program: Any) -> int:
    """Returns how many products the layers of a Q/DQ program have."""
    total = 0
    for node in program.graph.nodes:
        if str(node.target) in ("aten.linear.default", "aten.conv2d.default"):
            weight = node.args[1].meta["val"]
            total += node.meta["val"].numel() * weight[0].numel()
    return total


def bench_dense(name: str, rounds: int) -> None:
    make, shape = DENSE[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    params = {n: p.detach() for n, p in [*model.named_parameters(), *model.named_buffers()]}
    program, result = lowered(model, (x,), fq.w8a8(), params)
    packed = fq.prepack(result)
    with torch.no_grad():
        in_float = torch.compile(model, fullgraph=True)
        in_int8 = torch.compile(packed.module(), fullgraph=True)
        assert torch.equal(in_int8(x), packed.module()(x))
        times = harness.interleaved(
            {"float": lambda: in_float(x), "int8": lambda: in_int8(x)}, rounds
        )
    operations = 2 * multiplications(program)
    sizes = [
        sum(t.nbytes for t in tree.values()) for tree in (result.state_dict, model.state_dict())
    ]
    harness.report(
        {
            "network": name,
            "batch": shape[0],
            "GOP": operations / 1e9,
            "float_ms": times["float"].median * 1e3,
            "int8_ms": times["int8"].median * 1e3,
            "int8_over_float": times["int8"].ratio(times["float"]),
            "int8_GOP/s": operations / 1e9 / times["int8"].median,
            "float_GOP/s": operations / 1e9 / times["float"].median,
            "float_share_of_peak": operations / times["float"].median / harness.peak(True),
            "state_over_float": sizes[0] / sizes[1],
        }
    )


def bench_sparse(rounds: int, voxels: int) -> None:
    """VoxelBackBone8x: the lowered program, the list of layers in int8 and in float, and spconv."""
    make, channels, scan, least = NETWORKS["VoxelBackBone8x"]
    scene = scenes.synthetic(scan)
    coords = scene.coords[:voxels]
    shape = [max(pair) for pair in zip(scene.spatial_shape, least, strict=True)]
    x = SparseTensor(torch.randn(len(coords), channels), coords, shape, 1)
    torch.manual_seed(0)
    model = make(in_channels=channels).eval()
    listed = list_layers(model)
    layers, params = listed.layers, listed.params(model.state_dict())
    maps = make_maps(layers, x)
    int8 = {choice.layer for choice in choose_int8(layers, measured_times()[1]) if choice.int8}
    network = SparseNetwork(layers, batch_norm=False)
    rules, args = int8_rules(layers, int8), (x, maps)
    _, result = lowered(network, args, rules, params, dynamic_shapes=dynamic_rows(args))
    packed = fq.prepack(result).module(check_guards=False)
    plan = fq.make_plan(network, rules, args)
    stats = fq.calibrate_model(network, plan, params, [args], progress=False)
    deployed = to_int8(layers, int8, params, tie_scales(layers, int8, fq.finalize(plan, stats)))
    in_float, in_int8 = int8_network(layers, ()), int8_network(layers, int8)
    with torch.no_grad():
        compiled = torch.compile(packed, fullgraph=True, dynamic=True)
        want = in_int8(deployed, x, maps).features
        assert torch.equal(compiled(x, maps).features, want)
        assert torch.equal(packed(x, maps).features, want)
        runs: dict[str, harness.Run] = {
            "float": lambda: in_float(Deployed(params, {}), x, maps),
            "layers": lambda: in_int8(deployed, x, maps),
            "lowered": lambda: packed(x, maps),
            "lowered_compiled": lambda: compiled(x, maps),
            "rulebooks": lambda: make_maps(layers, x),
            "lowered_with_rulebooks": lambda: packed(x, make_maps(layers, x)),
        }
        package = harness.spconv()
        if package is not None:
            runs["spconv"] = spconv_network(layers, package, x)
        times = harness.interleaved(runs, rounds)
    row: dict[str, Any] = {
        "network": "VoxelBackBone8x",
        "voxels": len(coords),
        "convolutions": len(layers),
        "in_int8": len(int8),
        **{f"{name}_ms": timing.median * 1e3 for name, timing in times.items()},
        "lowered_over_float": times["lowered"].ratio(times["float"]),
        "lowered_over_layers": times["lowered"].ratio(times["layers"]),
    }
    if package is not None:
        row["lowered_over_spconv"] = times["lowered_with_rulebooks"].ratio(times["spconv"])
    harness.report(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=[*DENSE, "sparse"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--voxels", type=int, default=1_000_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    harness.report(harness.machine())
    for name in options.networks:
        if name == "sparse":
            bench_sparse(options.rounds, options.voxels)
        else:
            bench_dense(name, options.rounds)


if __name__ == "__main__":
    main()
