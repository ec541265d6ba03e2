"""Lowered programs against float under the same torch.compile: a CNN, an MLP, a sparse backbone.

Answers are checked first: the compiled int8 program equals the eager one bit for bit, and its integers
are those of the Q/DQ graph but for one step in at most one of a thousand. `float_share_of_peak` is of
the processor's float32 multiply-accumulate rate. On AVX2 without VNNI an exact integer product
(vpmaddwd, 16 a step) has twice the rate of a float one (8 a step), which bounds the ratio there.
"""

import argparse
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fquant as fq
import fquant_kernels
from benches import harness
from fquant.graph import dynamic_rows, site_integers
from fquant.sparse import KernelMap, SparseTensor, conv_map, sparse_conv, subm_conv, subm_map
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


def lowered(model: nn.Module, args: tuple[Any, ...], **options: Any) -> tuple[Any, Any]:
    """Returns the Q/DQ program and the int8 program, with scales from the arguments themselves."""
    params = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    params = {name: p.detach() for name, p in params.items()}
    plan = fq.make_plan(model, fq.w8a8(), args)
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
    program, result = lowered(model, (x,))
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


class Step(NamedTuple):
    """One convolution, "subm" or "conv", of a sparse backbone; sizes are (z, y, x)."""

    kind: str
    channels: tuple[int, int]
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (0, 0, 0)


def voxel_backbone() -> list[Step]:
    """VoxelBackBone8x (OpenPCDet)."""
    steps = [Step("subm", (4, 16)), Step("subm", (16, 16))]
    for cin, cout, padding in ((16, 32, 1), (32, 64, 1), (64, 64, 0)):
        steps.append(Step("conv", (cin, cout), (3, 3, 3), (2, 2, 2), (padding, 1, 1)))
        steps += [Step("subm", (cout, cout)), Step("subm", (cout, cout))]
    return [*steps, Step("conv", (64, 128), (3, 1, 1), (2, 1, 1))]


class Backbone(nn.Module):
    """A sparse backbone by fquant's float convolutions."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.weights = nn.ParameterList(
            torch.randn(s.channels[1], *s.kernel, s.channels[0]) * (2 / (s.channels[0] * 9)) ** 0.5
            for s in steps
        )

    def forward(self, x: SparseTensor, maps: list[KernelMap]) -> SparseTensor:
        for step, weight, kernel_map in zip(self.steps, self.weights, maps, strict=True):
            conv = subm_conv if step.kind == "subm" else sparse_conv
            x = conv(x, weight, kernel_map=kernel_map).map(torch.relu)
        return x


def make_maps(steps: list[Step], x: SparseTensor) -> list[KernelMap]:
    cells: Any = x
    maps, shared = [], {}
    for step in steps:
        if step.kind == "subm":
            key = (id(cells), step.kernel)
            if key not in shared:
                shared[key] = subm_map(cells, step.kernel)
            maps.append(shared[key])
        else:
            cells = conv_map(cells, step.kernel, step.stride, step.padding)
            maps.append(cells)
    return maps


def bench_sparse(rounds: int, voxels: int) -> None:
    steps = voxel_backbone()
    scene = scenes.synthetic("waymo")
    part = scene.coords[:voxels]
    x = SparseTensor(torch.randn(len(part), 4), part, scene.spatial_shape, 1)
    maps = make_maps(steps, x)
    torch.manual_seed(0)
    model = Backbone(steps)
    _, result = lowered(model, (x, maps), dynamic_shapes=dynamic_rows((x, maps)))
    packed = fq.prepack(result)
    weights = [w.detach().flatten(1, -2).contiguous() for w in model.weights]

    def in_float() -> Tensor:
        y = x.features
        for weight, kernel_map in zip(weights, maps, strict=True):
            y = fquant_kernels.sparse_conv_float(y, weight, kernel_map.neighbors).relu_()
        return y

    module = packed.module(check_guards=False)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, dynamic=True)
        assert torch.equal(compiled(x, maps).features, module(x, maps).features)
        runs: dict[str, harness.Run] = {"float": in_float, "int8": lambda: compiled(x, maps)}
        times = harness.interleaved(runs, rounds)
    row: dict[str, Any] = {
        "network": "VoxelBackBone8x",
        "voxels": len(part),
        **{f"{name}_ms": timing.median * 1e3 for name, timing in times.items()},
        "int8_over_float": times["int8"].ratio(times["float"]),
    }
    harness.report(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=[*DENSE, "sparse"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--voxels", type=int, default=20_000)
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
