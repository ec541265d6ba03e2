"""Hypothesis strategies for the kernels.

Sizes and switches are drawn by Hypothesis, so that they shrink; tensor values come from a seeded
generator, because drawing thousands of integers one by one is slow.
"""

import os
from typing import NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

# FQUANT_EXAMPLES=1000 is what a change of a kernel is tested with.
SETTINGS = settings(
    max_examples=int(os.environ.get("FQUANT_EXAMPLES", "60")), deadline=None, derandomize=True
)


class ConvCase(NamedTuple):
    """The arguments of `sparse_conv_int8`, in order."""

    features: Tensor
    weight: Tensor
    neighbors: Tensor
    scale: Tensor
    bias: Tensor | None
    residual: Tensor | None
    residual_scale: Tensor | None
    relu: bool
    out_dtype: torch.dtype | None


def _int8(shape: tuple[int, ...], values: str, random: torch.Generator) -> Tensor:
    if values == "extreme":
        return torch.where(torch.rand(shape, generator=random) < 0.9, 127, -128).to(torch.int8)
    if values == "normal":
        drawn = torch.randn(shape, generator=random) * 36
        return drawn.round().clamp(-128, 127).to(torch.int8)
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=random)


@st.composite
def conv_cases(draw: st.DrawFn) -> ConvCase:
    """Cases with every edge the kernels have: empty sides, odd channels, ties, saturation."""
    num_inputs = draw(st.sampled_from([0, 1, 2, 40, 300]))
    num_outputs = draw(st.sampled_from([0, 1, 15, 16, 17, 255, 256, 257, 600]))
    num_taps = draw(st.sampled_from([0, 1, 2, 8, 27]))
    num_channels = draw(st.one_of(st.integers(1, 70), st.sampled_from([0, 16, 32, 64, 128])))
    num_out_channels = draw(st.one_of(st.integers(1, 70), st.sampled_from([0, 16, 32, 64, 130])))
    density = draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
    values = draw(st.sampled_from(["uniform", "normal", "extreme"]))
    scales = draw(st.sampled_from(["fine", "halves", "coarse"]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    features = _int8((num_inputs, num_channels), values, random)
    if draw(st.booleans()):  # as after a ReLU
        features = features.clamp(min=0)
    weight = _int8((num_out_channels, num_taps, num_channels), values, random)
    shape = (num_taps, num_outputs)
    neighbors = torch.randint(0, max(num_inputs, 1), shape, generator=random)
    absent = torch.rand(shape, generator=random) >= density if num_inputs else torch.ones(shape)
    neighbors = neighbors.masked_fill(absent.bool(), -1).to(torch.int32)
    if scales == "halves":  # every odd sum is a tie
        scale = torch.full((num_out_channels,), 0.5)
    else:
        largest = 1e-3 if scales == "fine" else 1.0
        scale = torch.rand(num_out_channels, generator=random) * largest
    bias = residual = residual_scale = None
    if draw(st.booleans()):
        bias = torch.randn(num_out_channels, generator=random) * 30
    if draw(st.booleans()):
        residual = _int8((num_outputs, num_out_channels), values, random)
        residual_scale = torch.tensor(draw(st.sampled_from([0.5, 0.37, -1.25])))
    relu = draw(st.booleans())
    out_dtype = draw(st.sampled_from([None, torch.int8, torch.float16, torch.float32]))
    return ConvCase(
        features, weight, neighbors, scale, bias, residual, residual_scale, relu, out_dtype
    )
