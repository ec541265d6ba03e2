"""Fake quantization and calibration: how long they take, as ratios within one run.

    python -m benches.bench_fake_quantize [--size 10000000] [--repeats 9]

JSON lines: the machine, then a row per case: median and quartiles in milliseconds, ratio to its
baseline, GB/s of the traffic that it cannot avoid, and the same for a plain copy. Variants of a case
are timed in turn, so that a busy machine slows all of them. Memory that is given back to the system
after every call costs more than the arithmetic; `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184`
in the environment keeps it, as the allocators that training runs use do.
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fquant as fq

FLOAT_BYTES = 4


def timed(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each variant's runs, interleaved, after a warm-up (which compiles)."""
    for variant in variants.values():
        variant()
        variant()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def report(
    case: str, times: dict[str, list[float]], baseline: str, bytes_of: dict[str, int]
) -> None:
    base = statistics.median(times[baseline])
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        row = {
            "case": case,
            "variant": name,
            "ms": round(median, 2),
            "quartiles": [round(low, 2), round(high, 2)],
            "runs": len(values),
            f"ratio_to_{baseline}": round(median / base, 3),
        }
        if name in bytes_of:
            row["GB/s"] = round(bytes_of[name] / median / 1e6, 2)
        print(json.dumps(row), flush=True)


def bench_fake_quantize(size: int, repeats: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gradient, scale = torch.ones(size), torch.tensor(0.03)
    zero_point = torch.zeros((), dtype=torch.int32)

    def torch_native(x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -128, 127)

    def ours(x: Tensor) -> Tensor:
        return fq.fake_quantize(x, scale)

    def e4m3(x: Tensor) -> Tensor:
        return fq.fake_quantize(x, 1.0, spec=fq.E4M3)

    compiled, compiled_e4m3 = torch.compile(ours), torch.compile(e4m3)
    assert torch.equal(compiled(x), ours(x))
    assert torch.equal(compiled_e4m3(x), e4m3(x))
    # Torch multiplies by 1 / scale: a step off next to some ties.
    assert ((ours(x) - torch_native(x)).abs() > 1e-6).float().mean() < 1e-4

    def both(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = None
            function(x).backward(gradient)

        return run

    times = timed(
        {
            "torch": both(torch_native),
            "eager": both(ours),
            "compiled": both(compiled),
            "e4m3_eager": both(e4m3),
            "e4m3_compiled": both(compiled_e4m3),
            "copy": lambda: x.detach().clone(),
        },
        repeats,
    )
    # Forward reads x and writes y; backward reads x and the gradient and writes one.
    traffic = dict.fromkeys(times, 5 * FLOAT_BYTES * size)
    traffic["copy"] = 2 * FLOAT_BYTES * size
    report("fake_quantize forward+backward", times, "torch", traffic)


def bench_observers(size: int, repeats: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    observers = {
        "max": fq.MaxObserver(),
        "min_max": fq.MinMaxObserver(),
        "histogram": fq.HistogramObserver(),
    }
    variants: dict[str, Callable[[], object]] = {"copy": x.clone}
    for name, observer in observers.items():
        state = observer.update(observer.init(), x)
        variants[name] = lambda o=observer, s=state: o.update(s, x)
    compiled = torch.compile(observers["histogram"].update)
    state = observers["histogram"].init()
    variants["histogram_compiled"] = lambda: compiled(state, x)
    times = timed(variants, repeats)
    traffic = dict.fromkeys(times, FLOAT_BYTES * size)
    traffic["copy"] = 2 * FLOAT_BYTES * size
    report("observer update", times, "copy", traffic)


def resnet20(weights: list[Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """ResNet-20 for CIFAR without batch norm (folded); the input of each convolution is a site."""
    sites = {}
    remaining = iter(weights)

    def conv(x: Tensor, stride: int = 1) -> Tensor:
        sites[f"conv{len(sites)}"] = x
        return F.conv2d(x, next(remaining), stride=stride, padding=1)

    x = conv(x).relu()
    for stage in range(3):
        for block in range(3):
            stride = 2 if stage > 0 and block == 0 else 1
            y = conv(conv(x, stride).relu())
            if stride == 2:
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, x.shape[1]))
            x = (x + y).relu()
    return x, sites


def bench_calibration(repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    widths = [3, 16] + [16] * 6 + [32] * 6 + [64] * 6
    weights = [
        torch.randn(b, a, 3, 3, generator=generator) * (2 / (9 * a)) ** 0.5
        for a, b in itertools.pairwise(widths)
    ]
    batch = torch.randn(64, 3, 32, 32, generator=generator)

    def calibration(observer: fq.Observer) -> Callable[[], object]:
        observers = {f"conv{i}": observer for i in range(len(weights))}

        def run() -> object:
            with torch.no_grad():
                return fq.calibrate(
                    lambda x: resnet20(weights, x)[1], [batch], observers, progress=False
                )

        return run

    def forward() -> object:
        with torch.no_grad():
            return resnet20(weights, batch)

    times = timed(
        {
            "forward": forward,
            "max": calibration(fq.MaxObserver()),
            "histogram": calibration(fq.HistogramObserver()),
        },
        repeats,
    )
    report("calibration of ResNet-20, batch 64", times, "forward", {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=10**7)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    machine = {
        "machine": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **vars(options),
    }
    print(json.dumps(machine))
    bench_fake_quantize(options.size, options.repeats)
    bench_observers(options.size, options.repeats)
    bench_calibration(options.repeats)


if __name__ == "__main__":
    main()
