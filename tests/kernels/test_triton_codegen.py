"""The Triton kernels, compiled ahead of time without a GPU: what the machine code must be like."""

# ruff: noqa: E402  (nothing of Triton may be imported before it is known to be there)
import os
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="kernels are interpreted here"),
]

from fquant_kernels.conv_half.cuda_triton import half_config
from fquant_kernels.conv_int8 import cuda_triton as conv
from fquant_kernels.conv_int8.configs import default_config
from fquant_kernels.kernel_map import cuda_triton as maps
from fquant_kernels.kernel_map.rulebook import DEFAULT_TILE_ROWS
from fquant_kernels.triton_support import COMPILE_OPTIONS, MIN_TRITON_BLACKWELL
from tests.kernels.ahead_of_time import Compiled, compile_kernel

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
CAPABILITIES = [
    pytest.param(
        capability,
        marks=pytest.mark.skipif(
            capability >= 100 and VERSION < MIN_TRITON_BLACKWELL,
            reason="this Triton is refused on Blackwell: it contracts products and sums",
        ),
    )
    for capability in (80, 90, 100, 86, 89, 120)
]
MAIN = CAPABILITIES[:3]
INT8_PRODUCT = {80: "IMMA", 86: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "UTCIMMA", 120: "IMMA"}
POINTERS = {torch.int8: "*i8", torch.float16: "*fp16", torch.float32: "*fp32"}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_conv(
    capability: int,
    cin: int,
    cout: int,
    residual: bool = True,
    out_dtype: torch.dtype = torch.int8,
    wide: bool = False,
    half: str | None = None,
) -> Compiled:
    version = (capability // 10, capability % 10)
    choose = half_config if half else default_config
    config = choose(cin, cout, DEFAULT_TILE_ROWS, version)
    types = {
        "features": half or "*i8",
        "weight": half or "*i8",
        "spans": "*i32",
        "taps": "*i32",
        "rows": "*i32",
        "order": "*i32",
        "scale": "*fp32",
        "bias": "*fp32",
        "residual": half or "*i8",
        "residual_scale": "*fp32",
        "out": half or POINTERS[out_dtype],
        "num_outputs": "i32",
    }
    constants: dict[str, Any] = {
        "CIN": cin,
        "COUT": cout,
        "BLOCK_M": DEFAULT_TILE_ROWS,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "HAS_SCALE": half is None,
        "HAS_BIAS": True,
        "HAS_RESIDUAL": residual,
        "RELU": True,
        "WIDE": wide,
    }
    options = {
        **COMPILE_OPTIONS,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return compile_kernel(conv.conv_tiles_kernel, types, constants, capability, options)


def check_conv(code: Compiled, product: str) -> None:
    assert code.count_in_loop(product) > 0, f"no {product}: products are not on the tensor cores"
    assert code.stack == 0, "registers are spilled"
    assert code.count("LDL", "STL") == 0, "registers are spilled"
    assert code.count_in_loop("LDGSTS") > 0, "rows and weights are not copied asynchronously"
    assert code.count_in_loop("LDG") == 0, "the main loop waits for a load"
    assert code.count_in_loop("PRMT") == 0, "int8 operands are rearranged byte by byte"
    assert code.count("FFMA", "FFMA2") == 0, "a product and a sum are contracted"
    assert "fma." not in code.ptx.replace("wgmma.", ""), "a product and a sum are contracted"


@pytest.mark.parametrize("capability", MAIN)
@pytest.mark.parametrize("channels", [16, 32, 64, 128, 256])
def test_default_configurations(capability: int, channels: int) -> None:
    code = compile_conv(capability, channels, channels)
    check_conv(code, INT8_PRODUCT[capability])
    # 1.5 * 2^23 and its negative: the rounding is not optimized away.
    assert "0f4B400000" in code.ptx
    assert "0fCB400000" in code.ptx


@pytest.mark.parametrize("capability", MAIN)
@pytest.mark.parametrize(
    ("cin", "cout", "residual", "out_dtype", "wide"),
    [
        (48, 96, True, torch.int8, False),
        (80, 37, False, torch.int8, True),
        (64, 64, False, torch.float16, False),
        (64, 64, True, torch.float32, False),
    ],
)
def test_other_specializations(
    capability: int, cin: int, cout: int, residual: bool, out_dtype: torch.dtype, wide: bool
) -> None:
    code = compile_conv(capability, cin, cout, residual, out_dtype, wide)
    check_conv(code, INT8_PRODUCT[capability])


@pytest.mark.parametrize("capability", CAPABILITIES[3:])
def test_relatives_of_the_main_architectures(capability: int) -> None:
    check_conv(compile_conv(capability, 64, 64), INT8_PRODUCT[capability])


@pytest.mark.parametrize("capability", MAIN)
@pytest.mark.parametrize(("half", "channels"), [("*fp16", 64), ("*bf16", 256)])
def test_half_precision(capability: int, half: str, channels: int) -> None:
    code = compile_conv(capability, channels, channels, half=half)
    check_conv(code, {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[capability])


@pytest.mark.parametrize("capability", MAIN)
def test_kernel_map(capability: int) -> None:
    types = {
        "keys": "*i64",
        "row_of": "*i64",
        "out_coords": "*i32",
        "geometry": "*i64",
        "table": "*i32",
        "num_inputs": "i32",
        "num_outputs": "i32",
        "search_steps": "i32",
    }
    constants = {"DIMS": 3, "BLOCK": 128}
    code = compile_kernel(
        maps.kernel_neighbors_kernel, types, constants, capability, COMPILE_OPTIONS
    )
    assert code.stack == 0
    assert code.registers <= 64


@pytest.mark.parametrize("capability", MAIN)
def test_tile_rulebook(capability: int) -> None:
    types = {
        "neighbors": "*i32",
        "order": "*i32",
        "spans": "*i32",
        "taps": "*i32",
        "rows": "*i32",
        "num_taps": "i32",
        "num_outputs": "i32",
    }
    constants = {"BLOCK_M": DEFAULT_TILE_ROWS}
    code = compile_kernel(maps.tile_rulebook_kernel, types, constants, capability, COMPILE_OPTIONS)
    assert code.stack == 0
    assert code.registers <= 64
