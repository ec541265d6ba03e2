"""The ops on a CUDA device; `benches.gpu` runs the random cases on it."""

import pytest
import torch

from fquant_kernels import (
    kernel_neighbors,
    mask_order,
    pack_weight,
    sparse_conv_half,
    sparse_conv_int8,
    sparse_conv_int8_tiles,
    tile_rulebook,
)
from fquant_kernels.conv_int8 import configs, reference
from fquant_kernels.triton_support import why_unavailable
from tests.kernels.triton_cases import NUM_SHAPES, ConvCase, check_kernel_map, conv_case

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


def run(case: ConvCase) -> torch.Tensor:
    return sparse_conv_int8(*case)


@pytest.mark.parametrize("seed", range(0, NUM_SHAPES, 4))
def test_default_launch_equals_the_reference(seed: int) -> None:
    case = conv_case(seed).to("cuda")
    assert torch.equal(run(case), reference.sparse_conv_int8(*case))


@pytest.mark.parametrize("seed", range(20))
def test_kernel_maps_equal_the_reference(seed: int) -> None:
    check_kernel_map(seed, "cuda")


def wide_case(channels: int) -> ConvCase:
    """Default block sizes in full, more than one column block, ties and saturation."""
    generator = torch.Generator().manual_seed(channels)
    rows = 5000
    features = torch.randint(-128, 128, (rows, channels), generator=generator)
    weight = torch.randint(-128, 128, (channels, 27, channels), generator=generator)
    neighbors = torch.randint(-rows, rows, (27, rows), generator=generator).clamp(min=-1)
    return ConvCase(
        features.to(torch.int8),
        weight.to(torch.int8),
        neighbors.to(torch.int32),
        torch.rand(channels, generator=generator) * 1e-3,
        torch.randn(channels, generator=generator),
        features.to(torch.int8).flip(0),
        torch.tensor(0.37),
        True,
        torch.int8,
    ).to("cuda")


@pytest.mark.parametrize("channels", [16, 32, 64, 96, 128, 256])
def test_wide_layers_equal_the_reference(channels: int) -> None:
    case = wide_case(channels)
    want = reference.sparse_conv_int8(*case)
    assert torch.equal(run(case), want)
    order = mask_order(case.neighbors)
    for tile_rows in (64, 128):
        plan = tile_rulebook(case.neighbors, tile_rows, order)
        got = sparse_conv_int8_tiles(case.features, pack_weight(case.weight), plan, *case[3:])
        assert torch.equal(got, want)


@pytest.mark.parametrize("config", configs.candidates(64, 64, 128, (9, 0)))
def test_no_configuration_changes_the_result(config: configs.Config) -> None:
    from fquant_kernels.conv_int8 import cuda_triton

    case = wide_case(64)
    got = cuda_triton.sparse_conv_int8(*case, config=config)
    assert torch.equal(got, reference.sparse_conv_int8(*case))


def test_one_graph_serves_every_number_of_voxels() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    case = conv_case(5)._replace(residual=None, residual_scale=None).to("cuda")
    for num_outputs in (40, 60, 90):
        neighbors = case.neighbors[:, :1].expand(-1, num_outputs).contiguous()
        case = case._replace(neighbors=neighbors)
        assert torch.equal(compiled(case), reference.sparse_conv_int8(*case))


def test_opcheck() -> None:
    case = conv_case(5).to("cuda")
    torch.library.opcheck(torch.ops.fquant.sparse_conv_int8.default, tuple(case))


def test_half_sums_in_float32() -> None:
    neighbors = torch.arange(1000, dtype=torch.int32, device="cuda").repeat(27, 1)
    features = torch.ones(1000, 64, dtype=torch.float16, device="cuda")
    weight = torch.ones(32, 27, 64, dtype=torch.float16, device="cuda")
    got = sparse_conv_half(features, weight, neighbors)
    assert torch.equal(got, torch.full_like(got, 27 * 64))


def test_a_large_map_indexes_past_two_to_the_31_bytes() -> None:
    rows, channels = 2**31 // 256 + 1000, 256
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of GPU memory")
    features = torch.zeros(rows, channels, dtype=torch.int8, device="cuda")
    features[-1] = 1
    neighbors = torch.full((1, 200), rows - 1, dtype=torch.int32, device="cuda")
    weight = torch.ones(16, 1, channels, dtype=torch.int8, device="cuda")
    scale = torch.full((16,), 0.25, device="cuda")
    got = sparse_conv_int8(features, weight, neighbors, scale)
    assert torch.equal(got, torch.full_like(got, 64))


def test_maps_of_a_gpu_scene_are_those_of_the_cpu() -> None:
    coords = torch.randint(0, 30, (5000, 3)).unique(dim=0)
    coords = torch.nn.functional.pad(coords, (1, 0)).to(torch.int32)
    geometry = ((30,) * 3, (3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3)
    want = kernel_neighbors(coords, coords, *geometry)
    got = kernel_neighbors(coords.cuda(), coords.cuda(), *geometry)
    assert torch.equal(got.cpu(), want)
