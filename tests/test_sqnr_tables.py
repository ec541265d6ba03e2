"""Signal to noise of formats against the table, and against theory."""

import numpy as np
import pytest
import torch

import fquant as fq
from tests.block_cases import calibrated, mx
from tests.samples import sqnr_db

# quantization.md 5.5: 2^20 values of seed 0, decibels, blocks of 32 with the floor rule.
COUNT = 2**20
SAMPLES = {
    "gauss": lambda: torch.randn(COUNT, generator=torch.Generator().manual_seed(0)),
    "laplace": lambda: torch.from_numpy(np.random.default_rng(0).laplace(size=COUNT)).float(),
    "uniform": lambda: torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, COUNT)).float(),
    "student": lambda: torch.from_numpy(np.random.default_rng(0).standard_t(5, COUNT)).float(),
}


MX_FORMATS = (
    fq.QuantSpec(8, narrow_range=True),
    fq.E4M3,
    fq.E5M2,
    fq.E2M3,
    fq.E3M2,
    fq.E2M1,
    fq.QuantSpec(4, narrow_range=True),
)


SQNR = {
    "gauss": [41.66, 30.65, 25.37, 30.93, 25.37, 18.79, 17.55],
    "laplace": [40.00, 29.96, 25.22, 30.27, 25.22, 17.93, 16.00],
    "uniform": [48.06, 26.20, 24.31, 31.25, 24.31, 16.82, 22.69],
    "student": [40.00, 30.05, 25.24, 30.32, 25.24, 17.98, 15.94],
}


@pytest.mark.parametrize("name", SAMPLES)
def test_sqnr_of_mx_formats(name):
    x = SAMPLES[name]()
    found = [sqnr_db(x, calibrated(x, mx(spec))) for spec in MX_FORMATS]
    assert found == pytest.approx(SQNR[name], abs=0.05)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gauss", [0.25, 6.79, 14.14, 20.76, 27.07, 33.22, 39.31]),
        ("uniform", [6.02, 15.57, 22.92, 29.54, 35.85, 42.00, 48.10]),
    ],
)
def test_sqnr_of_integers_per_tensor(name, expected):
    x = SAMPLES[name]()
    found = [sqnr_db(x, calibrated(x, fq.QuantSpec(b, narrow_range=True))) for b in range(2, 9)]
    assert found == pytest.approx(expected, abs=0.05)
    if name == "uniform":  # signal 1 / 3, step 1 / q_max
        theory = [20 * np.log10(2 * (2 ** (b - 1) - 1)) for b in range(2, 9)]
        assert found == pytest.approx(theory, abs=0.05)


def test_sqnr_of_plain_casts():
    x = SAMPLES["gauss"]()
    casts = (fq.E4M3, fq.E5M2, fq.BF16, fq.FP16)
    found = [sqnr_db(x, fq.fake_quantize(x, 1.0, spec=spec)) for spec in casts]
    assert found == pytest.approx([31.5, 25.56, 55.59, 73.66], abs=0.05)
