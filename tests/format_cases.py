"""Grids of at most 8 bits, all of whose values the tests go through."""

import torch

import fquant as fq

NAN, INF = float("nan"), float("inf")
PRESETS = {
    "E4M3": fq.E4M3,
    "E5M2": fq.E5M2,
    "E4M3FNUZ": fq.E4M3FNUZ,
    "E5M2FNUZ": fq.E5M2FNUZ,
    "E2M3": fq.E2M3,
    "E3M2": fq.E3M2,
    "E2M1": fq.E2M1,
    "QPYTORCH_E4M3": fq.QPYTORCH_E4M3,
    "E1M2": fq.FloatFormat(1, 2, finite="all"),
    "E3M0": fq.FloatFormat(3, 0, finite="all"),
    "E3M0FN": fq.FloatFormat(3, 0, finite="fn"),
    "E3M4": fq.FloatFormat(3, 4),
    "E4M3IEEE": fq.FloatFormat(4, 3),
    "E4M3B11FNUZ": fq.FloatFormat(4, 3, bias=11, finite="fnuz"),
    "no subnormals": fq.FloatFormat(3, 2, finite="all", subnormals=False),
    "max 240": fq.FloatFormat(4, 3, finite="fn", max=240.0),
    "NF4": fq.NF4,
}


def all_values(spec):
    codes = torch.arange(2**spec.num_bits)
    values = spec.decode(codes, torch.float64)
    return codes, values


def points_between(values):
    """Grid points, the points half way, and their neighbours in float32."""
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, values * 1.5]).float()
    up, down = (torch.nextafter(x, torch.tensor(e)) for e in (INF, -INF))
    return torch.cat([x, up, down])
