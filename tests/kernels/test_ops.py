"""The ops as torch sees them: opcheck, compilation, derivatives, backends, self-test."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fquant_kernels
from fquant_kernels import native, registry
from fquant_kernels.conv_float import cpu as conv_float_cpu
from fquant_kernels.conv_float import reference as conv_float_reference

GEOMETRY = ([6, 7, 8], [3, 3, 3], [2, 2, 2], [1, 1, 1], [1, 1, 1])


def voxels(count: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    cells = torch.randperm(6 * 7 * 8, generator=random)[:count]
    return torch.stack([cells * 0, cells // 56, cells // 8 % 7, cells % 8], dim=1)


def op_cases() -> list[Any]:
    coords = voxels(40)
    table = fquant_kernels.kernel_neighbors(coords, coords, *GEOMETRY)
    int8 = torch.randint(-128, 128, (40, 5), dtype=torch.int8)
    weight = torch.randint(-128, 128, (6, 27, 5), dtype=torch.int8)
    scale, residual = torch.rand(6), torch.randint(-128, 128, (40, 6), dtype=torch.int8)
    packed, isa = fquant_kernels.pack_weight_for(weight)
    ops = torch.ops.fquant
    return [
        (ops.sparse_conv_int8, (int8, weight, table, scale)),
        (
            ops.sparse_conv_int8,
            (int8, weight, table, scale, scale, residual, torch.tensor(0.5), True, torch.float16),
        ),
        (
            ops.sparse_conv_int8_packed,
            (int8, packed, [6, 27, 5], isa, table, scale, scale, residual, torch.tensor(0.5), True),
        ),
        (ops.sparse_conv_float, (int8.float(), weight.float(), table, scale)),
        (ops.conv_output_coords, (coords, *GEOMETRY)),
        (ops.transposed_conv_output_coords, (coords, *GEOMETRY, [0, 0, 0])),
        (ops.kernel_neighbors, (coords, coords, *GEOMETRY)),
        (ops.transpose_neighbors, (table, 40)),
        (ops.abs_histogram, (int8.half(), torch.full((40,), 0.125), 16)),
    ]


@pytest.mark.parametrize(
    ("op", "args"), op_cases(), ids=lambda value: getattr(value, "__name__", "")
)
def test_opcheck(op: Any, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(op.default, args)


def test_one_graph_serves_every_number_of_voxels() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    weight = torch.randint(-128, 128, (4, 27, 4), dtype=torch.int8)
    scale = torch.full((4,), 1e-3)

    def layer(features: Tensor, table: Tensor) -> Tensor:
        for _ in range(10):
            features = fquant_kernels.sparse_conv_int8(features, weight, table, scale, relu=True)
        return features

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    geometry = ([6, 7, 8], [3] * 3, [1] * 3, [1] * 3, [1] * 3)
    for number in (40, 23, 300, 0):
        if number == 0:
            assert len(graphs) == 1  # Dynamo compiles sizes 0 and 1 on their own
        coords = voxels(number)
        table = fquant_kernels.kernel_neighbors(coords, coords, *geometry)
        features = torch.randint(-128, 128, (number, 4), dtype=torch.int8)
        assert torch.equal(compiled(features, table), layer(features, table))


def test_a_map_built_in_the_graph_has_a_size_of_its_own() -> None:
    def build(coords: Tensor) -> tuple[Tensor, Tensor]:
        out = fquant_kernels.conv_output_coords(coords, *GEOMETRY)
        return out, fquant_kernels.kernel_neighbors(coords, out, *GEOMETRY)

    compiled = torch.compile(build, fullgraph=True, dynamic=True, backend="eager")
    for number in (40, 100):
        for got, want in zip(compiled(voxels(number)), build(voxels(number)), strict=True):
            assert torch.equal(got, want)


def test_derivatives_are_refused() -> None:
    features, weight = torch.randn(3, 2, requires_grad=True), torch.randn(2, 1, 2)
    table = torch.zeros((1, 3), dtype=torch.int32)
    with pytest.raises(RuntimeError, match="sparse_conv_float has no derivative"):
        fquant_kernels.sparse_conv_float(features, weight, table)


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("channels", [1, 3, 16, 31, 64, 96])
def test_the_float_convolution_is_close_to_float64(isa: str, channels: int) -> None:
    random = torch.Generator().manual_seed(channels)
    features = torch.randn(500, channels, generator=random)
    weight = torch.randn(channels + 3, 27, channels, generator=random)
    table = torch.randint(-500, 500, (27, 600), generator=random).clamp(min=-1).to(torch.int32)
    bias = torch.randn(channels + 3, generator=random)
    args = (features, weight, table, bias)
    want = conv_float_reference.sparse_conv_float(
        *(value.double() if value.is_floating_point() else value for value in args)
    )
    bound = conv_float_reference.sparse_conv_float(
        features.abs().double(), weight.abs().double(), table, bias.abs().double()
    )
    got = conv_float_cpu.sparse_conv_float(*args, isa=isa).double()
    # A sum of n products in any order is off by at most n ulp of the sum of their magnitudes.
    assert bool(((got - want).abs() <= (27 * channels + 1) * 2.0**-23 * bound).all())


def test_the_float_convolution_without_rows_or_neighbors() -> None:
    weight = torch.randn(5, 27, 3)
    none = torch.full((27, 4), -1, dtype=torch.int32)
    bias = torch.arange(5.0)
    got = fquant_kernels.sparse_conv_float(torch.zeros(0, 3), weight, none, bias)
    assert torch.equal(got, bias.expand(4, 5))
    assert fquant_kernels.sparse_conv_float(torch.zeros(9, 3), weight, none[:, :0]).shape == (0, 5)


def test_self_test_passes_and_backends_say_what_is_in_use() -> None:
    checks = fquant_kernels.self_test(seconds=0.5)
    assert checks
    assert [check.failure for check in checks] == [None] * len(checks)
    if native.why_missing() is None:
        names = {backend.op for backend in fquant_kernels.backends() if not backend.unavailable}
        assert {"fquant::sparse_conv_int8", "fquant::kernel_neighbors"} <= names


def test_self_test_reports_a_wrong_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = registry.Backend(
        "fquant::transpose_neighbors", "cpu", "wrong", None, lambda table, n: table[:, :n] * 0
    )
    broken = registry.Backend("fquant::transpose_neighbors", "cpu", "broken", None, lambda: None)
    monkeypatch.setattr(registry, "_offered", [wrong, broken])
    failures = [check.failure for check in fquant_kernels.self_test(seconds=0.1)]
    assert failures[0] is not None
    assert "differs from the reference" in failures[0]
    assert failures[1] is not None
    assert "TypeError" in failures[1]
