"""Measures the launch parameters of a layer on the GPU that is there, and remembers the best."""

import functools
from pathlib import Path

import torch
import triton.testing

from fquant_kernels.conv_int8 import configs, tuning_cache
from fquant_kernels.conv_int8.cuda_triton import launch
from fquant_kernels.kernel_map.rulebook import TileRulebook


def tune(
    packed_weight: torch.Tensor,
    rulebook: TileRulebook,
    num_inputs: int,
    folder: Path | None = None,
) -> configs.Config:
    """Returns the fastest configuration for a layer, measured on random features.

    Args:
        packed_weight: `(K, Cout, Cin)` int8 on a CUDA device.
        rulebook: a typical one; its tile height is part of the cache's key, its size is not.
        num_inputs: rows of the features.
        folder: where to store the choice; FQUANT_TUNING_DIR when not given. Later calls of the op
            read it only from the folder that FQUANT_TUNING_DIR names.
    """
    folder = tuning_cache.folder_from_environment() if folder is None else folder
    _, cout, cin = packed_weight.shape
    device, tile_rows = packed_weight.device, rulebook.rows.shape[1]
    features = torch.randint(-128, 128, (num_inputs, cin), dtype=torch.int8, device=device)
    scale = torch.full((cout,), 1e-3, device=device)
    times = {}
    for config in configs.candidates(
        cin, cout, tile_rows, torch.cuda.get_device_capability(device)
    ):
        run = functools.partial(
            launch,
            features,
            packed_weight,
            rulebook,
            scale=scale,
            bias=scale,
            residual=None,
            residual_scale=None,
            relu=True,
            out_dtype=torch.int8,
            config=config,
        )
        times[config] = triton.testing.do_bench(run, return_mode="median")
    best = min(times, key=lambda config: times[config])
    if folder is not None:
        name = tuning_cache.key("sparse_conv_int8", device, cin=cin, cout=cout, tile_rows=tile_rows)
        tuning_cache.store(folder, name, best, times[best])
    return best
