"""`python -m tests.kernels.interpreter_run CASES CHECK...`: checks Triton kernels in its interpreter.

A program of its own, because Triton reads TRITON_INTERPRET when a kernel is defined, and a process
that interprets kernels cannot compile them.
"""

import os
import sys
import time


def main(cases: int, checks: list[str]) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from tests.kernels.triton_cases import CHECKS

    torch.set_num_threads(1)
    for check in checks:
        start = time.perf_counter()
        for seed in range(cases):
            try:
                CHECKS[check](seed)
            except Exception as error:
                raise SystemExit(
                    f"{check}, seed {seed}: {type(error).__name__}: {error}"
                ) from error
        print(f"{check}: {cases} cases in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
