"""A self-test of the backends in use, and of a kernel map: what `fquant doctor` runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fquant_kernels import native
from fquant_kernels.abs_histogram import reference as abs_histogram_reference
from fquant_kernels.conv_float import reference as conv_float_reference
from fquant_kernels.conv_int8 import reference as conv_int8_reference
from fquant_kernels.kernel_map import reference as kernel_map_reference
from fquant_kernels.kernel_map.pairs import pair_rulebook_reference
from fquant_kernels.registry import backends

Draw = Callable[[torch.Generator], tuple[Any, ...]]


@dataclass(frozen=True)
class Check:
    """The outcome of one backend's self-test: `failure` is None where every case agreed."""

    backend: str
    cases: int
    failure: str | None


def check_neighbors(neighbors: Tensor, num_inputs: int) -> None:
    """Raises if a kernel map cannot be one: an entry outside `[-1, N)`, or an input read twice.

    Reads values, so it is for tests and debugging, not for compiled regions.

    Raises:
        IndexError: an entry is below -1 or not below `num_inputs`.
        ValueError: at one offset two outputs read the same input.
    """
    if neighbors.numel() == 0:
        return
    least, most = (int(value) for value in neighbors.aminmax())
    if least < -1 or most >= num_inputs:
        raise IndexError(
            f"check_neighbors: neighbors must be in [-1, {num_inputs}), got {least} to {most}."
        )
    ordered = neighbors.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        raise ValueError("check_neighbors: at one offset an input must be read at most once.")


def _size(random: torch.Generator, largest: int) -> int:
    return int(torch.randint(1, largest + 1, (), generator=random))


def _table(random: torch.Generator, taps: int, outputs: int, inputs: int) -> Tensor:
    table = torch.randint(-inputs, inputs, (taps, outputs), generator=random)
    return table.clamp(min=-1).to(torch.int32)


def _draw_conv_int8(random: torch.Generator) -> tuple[Any, ...]:
    inputs, outputs = _size(random, 400), _size(random, 400)
    taps, channels, out_channels = _size(random, 27), _size(random, 80), _size(random, 80)

    def int8(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=random).to(torch.int8)

    return (
        int8(inputs, channels),
        int8(out_channels, taps, channels),
        _table(random, taps, outputs, inputs),
        torch.rand(out_channels, generator=random) * 1e-3,
        torch.randn(out_channels, generator=random),
        int8(outputs, out_channels),
        torch.rand((), generator=random),
        bool(_size(random, 2) == 1),
        (torch.int8, torch.float16, torch.float32)[_size(random, 3) - 1],
    )


def _draw_conv_pairs(random: torch.Generator) -> tuple[Any, ...]:
    features, weight, neighbors, *epilogue = _draw_conv_int8(random)
    return features, weight, neighbors, *pair_rulebook_reference(neighbors), *epilogue


def _draw_conv_float(random: torch.Generator) -> tuple[Any, ...]:
    # Integers whose sums stay far below 2^24: every order of summation gives the same floats.
    return tuple(
        value.float() if isinstance(value, Tensor) and value.dtype == torch.int8 else value
        for value in _draw_conv_int8(random)[:3]
    )


def _draw_geometry(random: torch.Generator) -> tuple[Any, ...]:
    axes = _size(random, 3)
    shape = [_size(random, 12) for _ in range(axes)]
    cells = torch.rand([2, *shape], generator=random) < 0.3
    coords = cells.nonzero()
    coords = coords[torch.randperm(coords.shape[0], generator=random)].to(torch.int32)
    ints = [[_size(random, 3) - least for _ in range(axes)] for least in (0, 0, 1, 0)]
    return coords, shape, *ints


def _draw_map(random: torch.Generator) -> tuple[Any, ...]:
    coords, *geometry = _draw_geometry(random)
    return coords, kernel_map_reference.conv_output_coords(coords, *geometry), *geometry


def _draw_transposed(random: torch.Generator) -> tuple[Any, ...]:
    coords, *geometry = _draw_geometry(random)
    return coords, *geometry, [0] * len(geometry[0])


def _draw_table(random: torch.Generator) -> tuple[Any, ...]:
    arguments = _draw_map(random)
    return kernel_map_reference.kernel_neighbors(*arguments), arguments[0].shape[0]


def _draw_histogram(random: torch.Generator) -> tuple[Any, ...]:
    rows, columns, num_bins = _size(random, 4), _size(random, 9000), _size(random, 300)
    x = torch.randn(rows, columns, generator=random).relu()
    x[0, 0] = (torch.nan, torch.inf, -1.0)[_size(random, 3) - 1]
    return x, torch.rand(rows, generator=random) * num_bins / 3, num_bins


def _conv_by_table(features: Tensor, weight: Tensor, neighbors: Tensor, *rest: Any) -> Tensor:
    return conv_int8_reference.sparse_conv_int8(features, weight, neighbors, *rest[3:])


_CASES: dict[str, tuple[Draw, Callable[..., Tensor]]] = {
    "fquant::abs_histogram": (_draw_histogram, abs_histogram_reference.abs_histogram),
    "fquant::sparse_conv_int8": (_draw_conv_int8, conv_int8_reference.sparse_conv_int8),
    "fquant::sparse_conv_int8_pairs": (_draw_conv_pairs, _conv_by_table),
    "fquant::sparse_conv_float": (_draw_conv_float, conv_float_reference.sparse_conv_float),
    "fquant::kernel_neighbors": (_draw_map, kernel_map_reference.kernel_neighbors),
    "fquant::conv_output_coords": (_draw_geometry, kernel_map_reference.conv_output_coords),
    "fquant::transposed_conv_output_coords": (
        _draw_transposed,
        kernel_map_reference.transposed_conv_output_coords,
    ),
    "fquant::transpose_neighbors": (_draw_table, kernel_map_reference.transpose_neighbors),
}


def _to(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _run(
    name: str, implementation: Callable[..., Tensor], op: str, device: str, seconds: float
) -> Check:
    draw, reference = _CASES[op]
    random = torch.Generator().manual_seed(0)
    cases, end = 0, time.monotonic() + seconds
    while cases == 0 or time.monotonic() < end:
        arguments = draw(random)
        want = reference(*arguments)
        try:
            got = implementation(*(_to(value, device) for value in arguments)).cpu()
            if op == "fquant::kernel_neighbors":
                check_neighbors(got, arguments[0].shape[0])
        except Exception as error:
            return Check(name, cases, f"case {cases}: {type(error).__name__}: {error}")
        if not torch.equal(got, want):
            return Check(name, cases, f"case {cases} differs from the reference")
        cases += 1
    return Check(name, cases, None)


def self_test(seconds: float = 5.0) -> list[Check]:
    """Returns the outcome of random cases against the reference, for every backend in use.

    On CPU the convolutions run once for each instruction set the processor has.

    Args:
        seconds: for all of it, shared evenly; each backend runs one case at least.

    Example:
        >>> all(check.failure is None for check in self_test(seconds=0.2))
        True
    """
    jobs: list[tuple[str, Callable[..., Tensor], str, str]] = []
    for backend in backends():
        if backend.unavailable is not None or backend.op not in _CASES:
            continue
        name = f"{backend.op} on {backend.device}, {backend.name}"
        if backend.device == "cpu" and "sparse_conv" in backend.op:
            for isa in native.available_isas():

                def forced(*args: Any, on: Any = backend.implementation, isa: str = isa) -> Tensor:
                    result: Tensor = on(*args, isa=isa)
                    return result

                jobs.append((f"{name} {isa}", forced, backend.op, backend.device))
        else:
            jobs.append((name, backend.implementation, backend.op, backend.device))
    return [_run(*job, seconds / len(jobs)) for job in jobs]
