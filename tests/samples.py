"""Samples with known best quantizers, and the measure of a quantizer."""

import torch

import fquant as fq

SAMPLES = 10**6
# The normal and the Laplace distribution's quantiles: a sample without sampling noise.
UNIFORM = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
GAUSS = torch.special.ndtri(UNIFORM)
LAPLACE = torch.where(UNIFORM < 0.5, (2 * UNIFORM).log(), -(2 - 2 * UNIFORM).log())


def histogram(x, num_bins=2048, **options):
    observer = fq.HistogramObserver(num_bins=num_bins, **options)
    return observer.histogram(observer.update(observer.init(), x))


def sqnr_db(x, y):
    x, y = x.double(), y.double()
    return 10 * torch.log10((x**2).sum() / ((x - y) ** 2).sum()).item()
