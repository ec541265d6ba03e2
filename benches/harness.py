"""The one harness of the benches: machine, interleaved timing, rows as JSON lines.

Times are process CPU time on one thread (other processes then cost little) and medians over
interleaved rounds; ratios are medians of the ratio within a round. Spread is the interquartile
range. With several threads, wall time.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fquant_kernels import native

Run = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of every round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        quarters = statistics.quantiles(self.seconds, n=4)
        return (quarters[2] - quarters[0]) / self.median

    def ratio(self, other: "Timing") -> float:
        """How many times faster than `other`, the median over rounds."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)


def interleaved(
    runs: dict[str, Run],
    rounds: int = 9,
    clock: Callable[[], float] = time.process_time,
    warm: bool = False,
) -> dict[str, Timing]:
    """Times each run once per round, after one round that does not count.

    If warm, each run that is timed comes right after one of its own: caches then hold what it leaves
    there itself, and not what the run before it left, which is another one's work.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if warm:
                run()
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: Timing(values) for name, values in seconds.items()}


def peak(is_float: bool = False) -> float:
    """Operations per second of the multiply-accumulate instruction on one core, best of nine."""
    rates = []
    for _ in range(9):
        start = time.process_time()
        done = native.measure_peak(is_float=is_float, rounds=1 << 20)
        rates.append(done / (time.process_time() - start))
    return max(rates)


def machine() -> dict[str, Any]:
    """What a figure cannot be read without."""
    model, isas = platform.processor(), native.available_isas()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        family = [line for line in cpuinfo.read_text().splitlines() if "cpu family" in line]
        model = " ".join(line.split(":")[1].strip() for line in (names[:1] + family[:1]))
    return {
        "cpu": model,
        "isa": f"{native.chosen_isa()} (of {', '.join(isas)})" if isas else "",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "argv": sys.argv[1:],
    }


def report(row: dict[str, Any]) -> None:
    """Prints one row; floats to four digits."""
    short = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
    print(json.dumps(short), flush=True)


def spconv() -> Any:
    """Returns spconv's torch package, or None, said on standard error, where there is none."""
    try:
        import spconv.pytorch as package
    except ImportError as error:
        print(f"spconv is absent, its columns are left out: {error}", file=sys.stderr)
        return None
    return package
