"""Compiles Triton kernels for a GPU that is not there, and reads the machine code."""

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

TENSOR_CORE = ("IMMA", "IGMMA", "UTCIMMA", "HMMA", "HGMMA", "UTCHMMA")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([^;]*?)\s*;")
_BRANCH = re.compile(r"^BRA\S*\s.*?(0x[0-9a-f]+)")


class Compiled(NamedTuple):
    ptx: str
    instructions: list[str]  # SASS without predicates, in order of address
    loop: list[str]  # the instructions of the innermost loop that multiplies matrices
    registers: int
    stack: int  # bytes per thread, spills included
    shared: int  # bytes per block

    def count(self, *opcodes: str) -> int:
        return _count(self.instructions, opcodes)

    def count_in_loop(self, *opcodes: str) -> int:
        return _count(self.loop, opcodes)


def _count(instructions: list[str], opcodes: tuple[str, ...]) -> int:
    return sum(re.split(r"[.\s]", text)[0] in opcodes for text in instructions)


def _innermost_matrix_loop(at: dict[int, str]) -> list[str]:
    """The shortest span from a branch target back to its branch that holds a matrix multiply."""
    loops = []
    for address, text in at.items():
        branch = _BRANCH.match(text)
        if branch and int(branch[1], 16) <= address:
            body = [at[i] for i in sorted(at) if int(branch[1], 16) <= i <= address]
            if _count(body, TENSOR_CORE):
                loops.append(body)
    return min(loops, key=len, default=[])


def _cuobjdump(cubin: bytes, *options: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run(
            [str(tool), *options, str(file)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": f"{tool.parent}:{os.environ.get('PATH', '')}"},
        )
    return done.stdout


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, object],
    capability: int,
    options: dict[str, Any],
) -> Compiled:
    """Compiles with pointers aligned to 16 bytes, as torch allocates them.

    `types` names the kernel's run-time arguments in Triton's words, such as "*i8" and "i32".
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*")
    }
    signature = {name: types.get(name, "constexpr") for name in names}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    cubin = compiled.asm["cubin"]
    at = {int(place, 16): text for place, text in _INSTRUCTION.findall(_cuobjdump(cubin, "-sass"))}
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump(cubin, "-res-usage")))
    return Compiled(
        compiled.asm["ptx"],
        [at[i] for i in sorted(at)],
        _innermost_matrix_loop(at),
        int(usage["REG"]),
        int(usage["STACK"]) + int(usage["LOCAL"]),
        compiled.metadata.shared,
    )
