"""Fake quantization with scales of the tensor's own blocks."""

import dataclasses

import fquant as fq


def mx(spec, block=32, axis=-1, rule="power_of_two_floor", rounding="half_even"):
    return dataclasses.replace(spec, axis=axis, block=block, scale_rule=rule, rounding=rounding)


def scale_of(x, spec, **options):
    return fq.compute_scale(fq.compute_amax(x, spec.axis, spec.block), spec, **options)


def calibrated(x, spec, **options):
    return fq.fake_quantize(x, scale_of(x, spec, **options), spec=spec)
