"""The ops with a ready-made plan, on the reference backend."""

from typing import Any

import pytest
import torch

from fquant_kernels import (
    TileRulebook,
    mask_order,
    pack_weight,
    sparse_conv_half,
    sparse_conv_int8_tiles,
    tile_rulebook,
)
from fquant_kernels.conv_int8 import reference
from tests.kernels.triton_cases import ConvCase, conv_case


def tiles_arguments(case: ConvCase) -> tuple[Any, ...]:
    rulebook = tile_rulebook(case.neighbors, 16, mask_order(case.neighbors))
    return (case.features, pack_weight(case.weight), rulebook, *case[3:])


@pytest.mark.parametrize("seed", range(40))
def test_tiles_equal_the_table(seed: int) -> None:
    case = conv_case(seed)
    got = sparse_conv_int8_tiles(*tiles_arguments(case))
    assert torch.equal(got, reference.sparse_conv_int8(*case))


@pytest.mark.parametrize("seed", [3, 5])
def test_opcheck(seed: int) -> None:
    features, packed, rulebook, *rest = tiles_arguments(conv_case(seed))
    op = torch.ops.fquant.sparse_conv_int8_tiles.default
    torch.library.opcheck(op, (features, packed, *rulebook, *rest))


def test_one_graph_serves_every_plan() -> None:
    frames = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        frames.append(graph)
        return graph.forward

    case = conv_case(5)
    weight = pack_weight(case.weight)

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def run(features: torch.Tensor, rulebook: TileRulebook) -> torch.Tensor:
        return sparse_conv_int8_tiles(features, weight, rulebook, case.scale)

    num_taps, channels = case.weight.shape[1:]
    for size in (40, 60, 90):
        generator = torch.Generator().manual_seed(size)
        table = torch.randint(-size, size, (num_taps, size), generator=generator)
        table = table.clamp(min=-1).to(torch.int32)
        features = torch.randint(-9, 9, (size, channels), generator=generator).to(torch.int8)
        want = reference.sparse_conv_int8(features, case.weight, table, case.scale)
        assert torch.equal(run(features, tile_rulebook(table, 16)), want)
    assert len(frames) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.float32}, TypeError, "features must be torch.int8"),
        ({"packed_weight": torch.float32}, TypeError, "packed_weight must be torch.int8"),
        ({"order": torch.int64}, TypeError, "order must be torch.int32"),
        ({"scale": torch.float64}, TypeError, "scale must be torch.float32"),
        ({"packed_weight": (2, 3, 24)}, ValueError, "packed_weight must have shape"),
        ({"taps": (5,)}, ValueError, "taps must have shape"),
        ({"rows": (1, 24)}, ValueError, "tile_rows must be a power of two"),
        ({"residual_scale": ()}, ValueError, "must be given together"),
        ({"packed_weight": (10_000, 3, 16)}, ValueError, "cannot overflow"),
    ],
)
def test_bad_arguments_are_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {
        "features": torch.zeros(4, 5, dtype=torch.int8),
        "packed_weight": torch.zeros(2, 3, 16, dtype=torch.int8),
        "spans": torch.zeros(1, 2, dtype=torch.int32),
        "taps": torch.zeros(1, dtype=torch.int32),
        "rows": torch.full((1, 16), -1, dtype=torch.int32),
        "order": torch.arange(4, dtype=torch.int32),
        "scale": torch.ones(3),
    }
    torch.ops.fquant.sparse_conv_int8_tiles(**arguments)
    for name, value in change.items():
        old = arguments.get(name, torch.zeros(()))
        is_shape = isinstance(value, tuple)
        arguments[name] = old.new_zeros(value) if is_shape else old.to(value)
    with pytest.raises(error, match=message):
        torch.ops.fquant.sparse_conv_int8_tiles(**arguments)


def test_derivatives_are_refused() -> None:
    features, packed, rulebook, scale, *rest = tiles_arguments(conv_case(5))
    scale.requires_grad_()
    with pytest.raises(RuntimeError, match="no derivative"):
        sparse_conv_int8_tiles(features, packed, rulebook, scale, *rest)


def test_half_rounds_once() -> None:
    # 2048 + 1 is no float16: rounded before the bias is added, the 1 would be lost.
    features = torch.tensor([[2048.0, 1.0]], dtype=torch.float16)
    weight = torch.ones(1, 1, 2, dtype=torch.float16)
    neighbors = torch.zeros(1, 1, dtype=torch.int32)
    got = sparse_conv_half(features, weight, neighbors, torch.tensor([1.0]))
    assert got.item() == 2050.0
    torch.library.opcheck(torch.ops.fquant.sparse_conv_half.default, (features, weight, neighbors))
    with pytest.raises(TypeError, match="features must be one of"):
        sparse_conv_half(features.float(), weight, neighbors)
    with pytest.raises(TypeError, match=r"weight must be torch\.float16"):
        sparse_conv_half(features, weight.bfloat16(), neighbors)
