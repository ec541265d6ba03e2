"""Launch parameters of the Triton convolution: a deterministic default, or a measured choice.

The default was chosen by reading machine code, on no GPU: no spills, then few instructions per
tensor-core operation, then occupancy. `benches/gpu.py` prints the time of each candidate.

Registers / instructions per matrix operation in the main loop, with bias, residual, ReLU and int8
output, 128 rows per tile (Triton 3.9; `python -m benches.gpu_codegen`):

    Cin = Cout   block          sm_80          sm_90          sm_100
    16           128x16x32 w4   56 /  92:4     48 / 105:2     40 / 116:1
    32           128x32x32 w4   80 /  88:8     84 /  98:2     61 / 106:1
    64           128x64x64 w4   153 / 135:32   162 / 123:4    178 / 137:2
    128          128x128x64 w8  128 / 124:32   175 / 107:2    172 / 124:2
    256          128x128x64 w8  144 / 126:32   175 / 109:2    172 / 125:2
    256          128x128x128 w8 146 / 200:64   175 / 151:4    176 / 166:4

What spilled: four warps at 128x128 on sm_90 (52 to 68 accesses) and sm_100 (62 to 83); 128x256 and
64x256 at four warps everywhere, 128x256 at eight (6 to 80); 128x64x128 w8 on sm_80 (9, 3 of them
in the loop). Five stages, because two loads deep (index, then row) three leave a single buffer on
sm_80.
"""

from typing import NamedTuple

import torch

from fquant_kernels.conv_int8 import tuning_cache


class Config(NamedTuple):
    """Launch parameters; the tile height is the rulebook's."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def default_config(cin: int, cout: int, tile_rows: int, capability: tuple[int, int]) -> Config:
    """Returns the launch parameters for a layer on a GPU of this compute capability.

    Args:
        cin: input channels of the packed weight.
        cout: output channels.
        tile_rows: output rows per tile.
        capability: compute capability, such as (9, 0).
    """
    block_n = min(128, max(16, 1 << (cout - 1).bit_length()))
    if cin <= 32:
        block_k = 32
    elif cin >= 256 and capability[0] in (9, 10):
        block_k = 128
    else:
        block_k = 64
    return Config(block_n, block_k, 8 if tile_rows * block_n > 128 * 64 else 4, 5)


def candidates(cin: int, cout: int, tile_rows: int, capability: tuple[int, int]) -> list[Config]:
    """Returns the configurations worth measuring, the default first."""
    default = default_config(cin, cout, tile_rows, capability)
    found = [default]
    for block_n in {default.block_n, max(16, default.block_n // 2)}:
        for block_k in {default.block_k, 64, 128 if cin > 64 else 64} if cin > 32 else {32}:
            for num_warps in (4, 8):
                for num_stages in (4, 5):
                    if tile_rows * block_n <= 2048 * num_warps:
                        found.append(Config(block_n, block_k, num_warps, num_stages))
    return [default, *sorted(set(found) - {default})]


def config_for(cin: int, cout: int, tile_rows: int, device: torch.device) -> Config:
    """Returns the measured configuration where the tuning cache has one, else the default.

    The cache is off unless the environment variable FQUANT_TUNING_DIR names its folder. The choice
    changes the time, never the result.
    """
    if device.type != "cuda":  # Triton's interpreter
        return default_config(cin, cout, tile_rows, (9, 0))
    folder = tuning_cache.folder_from_environment()
    if folder is not None:
        key = tuning_cache.key("sparse_conv_int8", device, cin=cin, cout=cout, tile_rows=tile_rows)
        values = tuning_cache.look_up(folder, key)
        if values is not None:
            return Config(*values)
    return default_config(cin, cout, tile_rows, torch.cuda.get_device_capability(device))
