"""Random cases for the Triton kernels, each from its seed alone, and the checks on them.

They use no test library, so that they also run on a GPU machine that has torch and Triton alone.
"""

import math
import random
from typing import NamedTuple

import torch

from fquant_kernels.conv_int8 import pack_weight, reference
from fquant_kernels.conv_int8.configs import Config
from fquant_kernels.kernel_map import reference as map_reference
from fquant_kernels.kernel_map import rulebook as rulebooks

OUT_DTYPES = (torch.int8, torch.float16, torch.float32)


class ConvCase(NamedTuple):
    features: torch.Tensor
    weight: torch.Tensor
    neighbors: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    residual_scale: torch.Tensor | None
    relu: bool
    out_dtype: torch.dtype

    def to(self, device: str) -> "ConvCase":
        moved = (v.to(device) if isinstance(v, torch.Tensor) else v for v in self)
        return ConvCase(*moved)


# Each shape compiles its kernels anew on a GPU, about a second; values and sizes cost nothing.
NUM_SHAPES = 64


def conv_case(seed: int) -> ConvCase:
    """A small convolution, of one of `NUM_SHAPES` shapes and any number of rows and taps."""
    shape = random.Random(seed % NUM_SHAPES)
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    kind = shape.choice(["random", "random", "saturated", "ties", "large", "small"])
    cin, cout = shape.randint(1, 40), shape.randint(1, 40)
    has_bias, has_residual, relu = shape.random() < 0.7, shape.random() < 0.5, shape.random() < 0.5
    out_dtype = torch.int8 if kind == "ties" else shape.choice([torch.int8, *OUT_DTYPES])
    num_inputs = choose.choice([0, 1, *(choose.randint(2, 60) for _ in range(8))])
    num_outputs = choose.choice([0, 1, *(choose.randint(2, 60) for _ in range(8))])
    num_taps = choose.choice([1, 8, 9, 27, choose.randint(0, 30)])
    density = choose.choice([0.0, 0.05, 0.1, 0.3, 0.3, 0.3, 1.0])
    if kind == "large":  # 27 * 64 products of about 13,000 pass 2^24
        num_inputs, num_outputs = choose.randint(1, 20), choose.randint(1, 20)
        cin, num_taps, density = 64, 27, 1.0

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    limits = {"large": (100, 127), "saturated": (-128, 127), "small": (-3, 3), "ties": (-2, 2)}
    low, high = limits.get(kind, (-128, 127))
    features = integers(low, high, num_inputs, cin).to(torch.int8)
    weight = integers(low, high, cout, num_taps, cin).to(torch.int8)
    present = torch.rand(num_taps, num_outputs, generator=generator) < density
    rows = integers(0, max(num_inputs - 1, 0), num_taps, num_outputs)
    neighbors = torch.where(present & (num_inputs > 0), rows, -1).to(torch.int32)
    spread = max(1.0, math.sqrt(num_taps * cin) * high * high)
    scale = floats(cout).abs() * {"saturated": 1e4, "large": 3e-3}.get(kind, 60.0) / spread
    bias = floats(cout) * 30
    residual_scale = floats().abs()
    if kind == "ties":
        scale = torch.full((cout,), choose.choice([0.5, 0.25, 1.5, -0.5]))
        bias = integers(-6, 6, cout) / 2
        residual_scale = torch.tensor(choose.choice([0.5, 1.5]))
    residual = integers(-128, 127, num_outputs, cout).to(torch.int8)
    return ConvCase(
        features,
        weight,
        neighbors,
        scale,
        bias if has_bias else None,
        residual if has_residual else None,
        residual_scale if has_residual else None,
        relu,
        out_dtype,
    )


def _launch(seed: int) -> tuple[int, Config]:
    """Small tiles: the interpreter's time goes by their number, not by their size."""
    shape = random.Random(1000 + seed % NUM_SHAPES)
    config = Config(shape.choice([16, 32]), shape.choice([32, 64]), shape.choice([1, 4]), 3)
    return shape.choice([16, 32]), config


def check_conv_int8(seed: int, device: str = "cpu") -> None:
    """Both Triton entry points give the reference's bits."""
    from fquant_kernels.conv_int8 import cuda_triton

    case = conv_case(seed).to(device)
    tile_rows, config = _launch(seed)
    want = reference.sparse_conv_int8(*case)
    got = cuda_triton.sparse_conv_int8(*case, tile_rows=tile_rows, config=config)
    assert got.dtype == want.dtype
    assert torch.equal(got, want), f"seed {seed}: sparse_conv_int8 differs"
    order = rulebooks.mask_order(case.neighbors) if seed % 2 else None
    plan = rulebooks.tile_rulebook(case.neighbors, tile_rows, order)
    packed = pack_weight(case.weight)
    got = cuda_triton.sparse_conv_int8_tiles(case.features, packed, *plan, *case[3:], config=config)
    assert torch.equal(got, want), f"seed {seed}: sparse_conv_int8_tiles differs"


def check_kernel_map(seed: int, device: str = "cpu") -> None:
    """The kernel map and the rulebook from Triton are the torch ones."""
    from fquant_kernels.kernel_map import cuda_triton

    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dims = choose.randint(1, 4)

    def per_axis(low: int, high: int) -> list[int]:
        return [choose.randint(low, high) for _ in range(dims)]

    shape, kernel = per_axis(1, 8), per_axis(1, 4 if dims < 3 else 3)
    stride, padding, dilation = per_axis(1, 3), per_axis(0, 2), per_axis(1, 3)
    cells = 2 * math.prod(shape)  # two batch elements
    count = choose.choice([0, 1, choose.randint(0, min(cells, 80))])
    keys = torch.randperm(cells, generator=generator)[:count]
    dtype = choose.choice([torch.int32, torch.int64])
    coords = map_reference.coords_of_keys(keys, shape, dtype).to(device)
    out_shape = map_reference.conv_output_shape(shape, kernel, stride, padding, dilation)
    submanifold = choose.random() < 0.4 or min(out_shape) < 1
    if submanifold:
        stride = [1] * dims
        padding = [k // 2 * d for k, d in zip(kernel, dilation, strict=True)]
        outputs = coords
    else:
        outputs = map_reference.conv_output_coords(coords, shape, kernel, stride, padding, dilation)
    geometry = (shape, kernel, stride, padding, dilation)
    want = map_reference.kernel_neighbors(coords, outputs, *geometry)
    got = cuda_triton.kernel_neighbors(coords, outputs, *geometry)
    assert got.dtype == want.dtype
    assert torch.equal(got, want), f"seed {seed}: kernel_neighbors differs"
    order = rulebooks.mask_order(want) if choose.random() < 0.5 else None
    tile_rows = choose.choice([16, 32])
    plan = rulebooks.tile_rulebook(want, tile_rows, order, compact=False)
    made = cuda_triton.tile_rulebook(want, tile_rows, order)
    assert torch.equal(made.spans, plan.spans), f"seed {seed}: spans differ"
    assert torch.equal(made.order, plan.order), f"seed {seed}: order differs"
    again = rulebooks.neighbors_of_rulebook(made, math.prod(kernel))
    assert torch.equal(again, want), f"seed {seed}: tile_rulebook differs"


def check_conv_half(seed: int, device: str = "cpu") -> None:
    """Small integers and halves, whose sums are exact in any order, give the reference's bits."""
    from fquant_kernels.conv_half import cuda_triton
    from fquant_kernels.conv_half import reference as half_reference

    case = conv_case(seed).to(device)
    # Triton's interpreter multiplies the bit patterns of bfloat16 matrices (3.9).
    dtype = torch.float16 if device == "cpu" else (torch.float16, torch.bfloat16)[seed % 2]
    features, weight = (case.features.clamp(-4, 4) / 2).to(dtype), case.weight.clamp(-4, 4) / 2
    residual = None if case.residual is None else case.residual.to(dtype)
    arguments = (features, weight.to(dtype), case.neighbors, case.bias, residual, case.relu)
    tile_rows, config = _launch(seed)
    want = half_reference.sparse_conv_half(*arguments)
    got = cuda_triton.sparse_conv_half(*arguments, tile_rows=tile_rows, config=config)
    assert got.dtype == dtype
    assert torch.equal(got, want), f"seed {seed}: sparse_conv_half differs"


CHECKS = {
    "conv_int8": check_conv_int8,
    "kernel_map": check_kernel_map,
    "conv_half": check_conv_half,
}
