"""Histograms of |x| on power-of-two ranges: the counting that calibration spends its time on."""

from fquant_kernels.abs_histogram.op import abs_histogram

__all__ = ["abs_histogram"]
