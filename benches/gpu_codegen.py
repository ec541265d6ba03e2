"""`python -m benches.gpu_codegen`: what the int8 kernel compiles to, without a GPU.

One line per architecture, channels and block: registers, spilled bytes, shared memory, and the
instructions of the main loop per tensor-core operation in it. The defaults in
`fquant_kernels/conv_int8/configs.py` were chosen from it.
"""

import argparse
import sys

from fquant_kernels.conv_int8.configs import candidates, default_config
from fquant_kernels.triton_support import COMPILE_OPTIONS
from tests.kernels.ahead_of_time import TENSOR_CORE, compile_kernel


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benches.gpu_codegen", description=__doc__)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--tile-rows", type=int, nargs="+", default=[64, 128])
    options = parser.parse_args(arguments)

    from fquant_kernels.conv_int8.cuda_triton import conv_tiles_kernel

    types = dict.fromkeys(("features", "weight", "residual", "out"), "*i8")
    types |= dict.fromkeys(("spans", "taps", "rows", "order"), "*i32")
    types |= dict.fromkeys(("scale", "bias", "residual_scale"), "*fp32")
    types["num_outputs"] = "i32"
    flags = dict.fromkeys(("HAS_SCALE", "HAS_BIAS", "HAS_RESIDUAL", "RELU"), True)
    for capability in options.capability:
        version = (capability // 10, capability % 10)
        for channels in options.channels:
            for tile_rows in options.tile_rows:
                default = default_config(channels, channels, tile_rows, version)
                for config in candidates(channels, channels, tile_rows, version):
                    constants = {
                        **flags,
                        "CIN": channels,
                        "COUT": channels,
                        "BLOCK_M": tile_rows,
                        "BLOCK_N": config.block_n,
                        "BLOCK_K": config.block_k,
                        "WIDE": False,
                    }
                    launch = {"num_warps": config.num_warps, "num_stages": config.num_stages}
                    code = compile_kernel(
                        conv_tiles_kernel, types, constants, capability, COMPILE_OPTIONS | launch
                    )
                    block = f"{tile_rows}x{config.block_n}x{config.block_k}"
                    print(
                        f"sm_{capability} C {channels:3d} {block:11s} w{config.num_warps} "
                        f"stages {config.num_stages} registers {code.registers:3d} "
                        f"stack {code.stack:3d} shared {code.shared:6d} "
                        f"loop {len(code.loop):3d}:{code.count_in_loop(*TENSOR_CORE):d}"
                        f"{'  default' if config == default else ''}",
                        flush=True,
                    )


if __name__ == "__main__":
    main(sys.argv[1:])
