"""The half-precision sparse convolution on NVIDIA GPUs: the int8 kernel with float32 sums."""

import torch
from torch import Tensor

from fquant_kernels.conv_int8.configs import Config, default_config
from fquant_kernels.conv_int8.cuda_triton import launch
from fquant_kernels.conv_int8.packing import pack_weight, pad_channels
from fquant_kernels.kernel_map.cuda_triton import tile_rulebook
from fquant_kernels.kernel_map.rulebook import DEFAULT_TILE_ROWS, TileRulebook


def half_config(cin: int, cout: int, tile_rows: int, capability: tuple[int, int]) -> Config:
    """Returns the int8 launch parameters with at most 64 channels a step.

    At two bytes an element five stages of 128 channels leave no shared memory for a second block.
    """
    config = default_config(cin, cout, tile_rows, capability)
    return config._replace(block_k=min(config.block_k, 64))


def sparse_conv_half_tiles(
    features: Tensor,
    packed_weight: Tensor,
    rulebook: TileRulebook,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    config: Config | None = None,
) -> Tensor:
    """Returns `sparse_conv_half` of a packed weight and a rulebook."""
    _, cout, cin = packed_weight.shape
    if config is None:
        on_gpu = features.is_cuda
        capability = torch.cuda.get_device_capability(features.device) if on_gpu else (9, 0)
        config = half_config(cin, cout, rulebook.rows.shape[1], capability)
    return launch(
        pad_channels(features),
        packed_weight.contiguous(),
        rulebook,
        None,
        None if bias is None else bias.contiguous(),
        None if residual is None else residual.contiguous(),
        None,
        relu,
        features.dtype,
        config,
    )


def sparse_conv_half(
    features: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    tile_rows: int = DEFAULT_TILE_ROWS,
    config: Config | None = None,
) -> Tensor:
    """Returns `reference.sparse_conv_half`, up to the order of its sums."""
    rulebook = tile_rulebook(neighbors, tile_rows)
    packed = pack_weight(weight)
    return sparse_conv_half_tiles(features, packed, rulebook, bias, residual, relu, config)
