"""Training as pure functions: gradients by torch.func, AdamW over the parameter dict."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fquant.demo.data import Batch, Split, shuffled_batches
from fquant.progress import progress_bar

Params = dict[str, Tensor]
Forward = Callable[[Params, Batch], Tensor]

BATCH_SIZE = 64
WEIGHT_DECAY = 0.3


class AdamState(NamedTuple):
    """First and second moments per parameter, and the number of steps taken."""

    mean: Params
    square: Params
    step: int


def adam_init(params: Params) -> AdamState:
    """Returns the state before the first step."""
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    return AdamState(zeros, zeros, 0)


def adam_step(
    params: Params, gradients: Params, state: AdamState, rate: float
) -> tuple[Params, AdamState]:
    """Returns (params, state) after one step of AdamW (Loshchilov, Hutter 2019, arXiv 1711.05101)."""
    step = state.step + 1
    mean = {n: 0.9 * m + 0.1 * gradients[n] for n, m in state.mean.items()}
    square = {n: 0.999 * s + 0.001 * gradients[n] ** 2 for n, s in state.square.items()}
    updated = {
        n: p * (1 - rate * WEIGHT_DECAY)
        - rate * (mean[n] / (1 - 0.9**step)) / ((square[n] / (1 - 0.999**step)).sqrt() + 1e-8)
        for n, p in params.items()
    }
    return updated, AdamState(mean, square, step)


def train(
    forward: Forward,
    params: Params,
    split: Split,
    *,
    epochs: int,
    rate: float,
    description: str,
    progress: bool | None,
) -> Params:
    """Returns params after `epochs` passes over the training images, the rate falling as a cosine."""

    def loss(params: Params, batch: Batch) -> Tensor:
        return F.cross_entropy(forward(params, batch), batch.labels)

    gradient = torch.func.grad(loss)
    generator = torch.Generator().manual_seed(1)
    state = adam_init(params)
    for epoch in progress_bar(range(epochs), description, progress):
        now = rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
        images = (split.train_images, split.train_labels)
        for batch in shuffled_batches(*images, BATCH_SIZE, generator):
            params, state = adam_step(params, gradient(params, batch), state, now)
    return params
