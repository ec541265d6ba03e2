"""Histograms of |x|: the backends against the definition, and the definition against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fquant_kernels
from fquant_kernels import native
from fquant_kernels.abs_histogram import cpu, reference
from tests.kernels.strategies import SETTINGS

BACKENDS = [
    pytest.param(reference.abs_histogram, id="reference"),
    pytest.param(
        cpu.abs_histogram,
        id="cpp",
        marks=pytest.mark.skipif(native.why_missing() is not None, reason="no compiled library"),
    ),
]
NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def relu_like(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=random).relu().to(dtype)


def units(rows: int, dtype: torch.dtype, start: float = 8.0) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return start * 2.0 ** torch.arange(rows, dtype=wide)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_are_those_of_numpy(backend, dtype):
    # 2051 values: more than two blocks, and a last one that four tables do not divide.
    x = relu_like(3, 2051, dtype) * torch.tensor([[1.0], [-1.0], [0.5]], dtype=dtype)
    counts = backend(x, units(3, dtype), 16)
    for row in range(3):
        ends = (0.0, 16 / (8 * 2.0**row))
        # numpy's last bin holds its upper end, ours does not.
        data = x[row].double().abs().numpy()
        expected = np.histogram(data[data < ends[1]], 16, ends)[0]
        assert counts[row].tolist() == expected.tolist()


@SETTINGS
@given(
    rows=st.integers(0, 5),
    columns=st.integers(0, 40),
    num_bins=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    specials=st.lists(st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1e-40, 1e30]), max_size=9),
    seed=st.integers(0, 2**31),
)
def test_the_compiled_counts_are_the_reference(rows, columns, num_bins, dtype, specials, seed):
    x = relu_like(rows, columns, dtype, seed)
    some = torch.tensor(specials[: x.numel()]).to(dtype)
    x.view(-1)[: len(some)] = some
    expected = reference.abs_histogram(x, units(rows, dtype, num_bins / 3), num_bins)
    assert torch.equal(
        fquant_kernels.abs_histogram(x, units(rows, dtype, num_bins / 3), num_bins), expected
    )
    assert expected.dtype == torch.int64


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_in_no_bin_is_not_counted(backend):
    below = float(np.nextafter(np.float32(4), np.float32(0)))
    x = torch.tensor([[NAN, INF, -INF, 4.0, -4.0, 1e38, -below, 0.0, -0.0, 1.0]])
    assert backend(x, torch.tensor([1.0]), 4).tolist() == [[2, 1, 0, 1]]
    assert backend(x[:, :0], torch.tensor([1.0]), 4).tolist() == [[0, 0, 0, 0]]
    assert backend(x[:0], torch.zeros(0), 4).shape == (0, 4)


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_threads_do_not_change_counts(rows, monkeypatch):
    # Parts of one row start at 2^21 values; 2^23 + 13 are up to four, of which the last is short.
    x = relu_like(rows, (2**23 + 13) // rows, torch.float32)
    x[-1, -1] = 100.0
    arguments = (x, units(rows, torch.float32), 64)
    expected = reference.abs_histogram(*arguments)
    for threads in (1, 2, 3, 4, 16):
        monkeypatch.setattr(native, "num_threads", lambda threads=threads: threads)
        assert torch.equal(fquant_kernels.abs_histogram(*arguments), expected)


@pytest.mark.parametrize("part", [1, 100])
def test_parts_of_the_reference_do_not_change_counts(part, monkeypatch):
    x = relu_like(7, 700)
    expected = fquant_kernels.abs_histogram(x, units(7, x.dtype), 2)
    monkeypatch.setattr(reference, "PART", part)
    assert torch.equal(reference.abs_histogram(x, units(7, x.dtype), 2), expected)


def test_vmap_is_member_by_member():
    x = relu_like(6, 30).reshape(2, 3, 30)
    counts = torch.func.vmap(fquant_kernels.abs_histogram, (0, None, None))(
        x, units(3, x.dtype), 16
    )
    for member in range(2):
        expected = reference.abs_histogram(x[member], units(3, x.dtype), 16)
        assert torch.equal(counts[member], expected)


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, (torch.ones(1, 2).int(), ONE, 4), "x must be floating point, got torch.int32"),
        (ValueError, (torch.ones(2), ONE, 4), r"x must have shape \('R', 'N'\), got \(2,\)"),
        (TypeError, (torch.ones(1, 2), ONE.double(), 4), "bins_per_unit must be torch.float32"),
        (TypeError, (torch.ones(1, 2).double(), ONE, 4), "bins_per_unit must be torch.float64"),
        (ValueError, (torch.ones(2, 2), ONE, 4), r"bins_per_unit must have shape \(2,\)"),
        (ValueError, (torch.ones(1, 2), ONE, 0), "num_bins must be from 1 to 16777216, got 0"),
        (ValueError, (torch.ones(1, 2), ONE, 2**24 + 1), "num_bins must be from 1 to 16777216"),
    ],
)
def test_bad_arguments_are_named(error, arguments, message):
    with pytest.raises(error, match="fquant::abs_histogram: " + message):
        fquant_kernels.abs_histogram(*arguments)


def test_derivatives_are_refused():
    with pytest.raises(RuntimeError, match="abs_histogram has no derivative"):
        fquant_kernels.abs_histogram(torch.ones(1, 2, requires_grad=True), ONE, 4)
