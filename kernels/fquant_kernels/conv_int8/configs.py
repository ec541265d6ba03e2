"""Tile sizes of the Triton int8 convolution: a deterministic choice per channels and GPU."""

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Launch parameters; the tile height is the rulebook's."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def default_config(
    cin: int, cout: int, tile_rows: int, capability: tuple[int, int]
) -> Config:
    """Returns the launch parameters for a layer on a GPU of this compute capability."""
    block_n = min(128, max(16, 1 << (cout - 1).bit_length()))
    block_k = 32 if cin <= 32 else 64
    num_warps = 8 if block_n * tile_rows >= 128 * 128 else 4
    return Config(block_n, block_k, num_warps, 5)


def config_for(cin: int, cout: int, tile_rows: int, device: torch.device) -> Config:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return default_config(cin, cout, tile_rows, capability)
