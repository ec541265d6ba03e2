"""From a list of layers to an int8 network, as the sparse examples do it: train, PTQ, QAT, int8.

Everything is a function of parameter dicts: gradients by `torch.func.grad`, the module by
`functional_call`, AdamW as a pure function. Nothing here knows what the data are.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

import fquant as fq
from fquant.demo.report import accuracy
from fquant.demo.training import adam_init, adam_step
from fquant.progress import progress_bar
from fquant.sparse import SparseTensor
from fquant.sparse_network import (
    Deployed,
    Layer,
    SparseNetwork,
    fold_network,
    int8_network,
    int8_rules,
    make_maps,
    tie_scales,
    to_int8,
)
from fquant.sparse_network.maps import Maps
from fquant.sparse_network.module import Value

Params = dict[str, Tensor]


class Batch(NamedTuple):
    """Cells with their maps, and what is known of them.

    Attributes:
        x: the input.
        maps: its kernel maps.
        row: for each label, the row of the network's output that predicts it.
        labels: classes.
    """

    x: SparseTensor
    maps: Maps
    row: Tensor
    labels: Tensor


class Trained(NamedTuple):
    """Parameters of a float network, and the buffers of its batch norms."""

    params: Params
    buffers: Params


class Quantized(NamedTuple):
    """A calibrated network: what is quantized, with which steps, and the folded parameters."""

    model: SparseNetwork
    int8: frozenset[str]
    plan: fq.Plan
    params: Params
    scales: Params


class Row(NamedTuple):
    """One variant of a network.

    Attributes:
        name: float, PTQ, ...
        logits: for every label of the test batches.
        parameter_bytes: of its parameters with their scales.
        milliseconds: median time of a test batch, kernel maps made beforehand.
    """

    name: str
    logits: Tensor
    parameter_bytes: int
    milliseconds: float


def make_batch(layers: Sequence[Layer], x: SparseTensor, row: Tensor, labels: Tensor) -> Batch:
    """Returns a batch with its kernel maps."""
    return Batch(x, make_maps(layers, x), row, labels)


def logits_of(output: Value) -> Tensor:
    """Returns the features of a record, or the tensor of a network that ends in a global pool."""
    return output if isinstance(output, Tensor) else output.features


def loss_of(output: Value, batch: Batch) -> Tensor:
    """Returns the mean cross entropy over the labels."""
    return F.cross_entropy(logits_of(output)[batch.row], batch.labels)


def train_float(
    layers: Sequence[Layer],
    axes: int,
    batches: Iterable[Batch],
    steps: int,
    rate: float,
    seed: int,
    progress: bool | None,
) -> Trained:
    """Returns a network with batch norm after one AdamW step per batch, the rate falling as a cosine."""
    model = SparseNetwork(layers, axes, seed=seed)
    params = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def loss(params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        updated = {name: b.clone() for name, b in buffers.items()}  # batch norm writes them
        output = functional_call(model, {**params, **updated}, (batch.x, batch.maps))
        return loss_of(output, batch), updated

    gradient = torch.func.grad(loss, has_aux=True)
    state = adam_init(params)
    for step, batch in enumerate(progress_bar(batches, "train in float", progress)):
        gradients, buffers = gradient(params, buffers, batch)
        params, state = adam_step(params, gradients, state, cosine(rate, step, steps))
    return Trained(params, buffers)


def cosine(rate: float, step: int, steps: int) -> float:
    """Returns the learning rate of a step: half a cosine from rate to 0."""
    return rate * (1 + math.cos(math.pi * step / steps)) / 2


def quantize_network(
    layers: Sequence[Layer],
    axes: int,
    int8: frozenset[str],
    trained: Trained,
    batches: Sequence[Batch],
    progress: bool | None,
) -> Quantized:
    """Returns the network after post-training quantization: batch norms folded, ranges by maximum."""
    model = SparseNetwork(layers, axes, batch_norm=False)
    params = fold_network(layers, {**trained.params, **trained.buffers})
    inputs = [(batch.x, batch.maps) for batch in batches]
    plan = fq.make_plan(model, int8_rules(layers, int8), inputs[0])
    stats = fq.calibrate_model(model, plan, params, inputs, progress=progress)
    scales = tie_scales(layers, int8, fq.finalize(plan, stats))
    return Quantized(model, int8, plan, params, scales)


def fine_tune(
    layers: Sequence[Layer],
    quantized: Quantized,
    batches: Iterable[Batch],
    schedule: fq.FineTuning,
    progress: bool | None,
) -> Quantized:
    """Returns the network after quantization-aware training, the scales of calibration left as they are.

    It learns the float network's predictions, not the labels: what rounding changed is brought back, and
    nothing else moves (distillation: Hinton, Vinyals, Dean 2015, arXiv 1503.02531).
    """
    forward = fq.fake_quant(quantized.model, quantized.plan)
    teacher = int8_network(layers, frozenset())
    in_float = Deployed(dict(quantized.params), {})

    def loss(params: Params, batch: Batch, wanted: Tensor) -> Tensor:
        output = forward(params, quantized.scales, batch.x, batch.maps)
        return F.cross_entropy(logits_of(output), wanted)

    gradient = torch.func.grad(loss)
    params = quantized.params
    state = adam_init(params)
    for step, batch in enumerate(
        progress_bar(batches, "fine-tune with fake quantization", progress)
    ):
        with torch.no_grad():
            wanted = logits_of(teacher(in_float, batch.x, batch.maps)).softmax(dim=1)
        rate = schedule.learning_rate(step)
        params, state = adam_step(params, gradient(params, batch, wanted), state, rate)
    return quantized._replace(params=params)


def deploy(layers: Sequence[Layer], quantized: Quantized) -> Deployed:
    """Returns the network with integer weights."""
    return to_int8(layers, quantized.int8, quantized.params, quantized.scales)


def compare(
    layers: Sequence[Layer],
    ptq: Quantized,
    qat: Quantized,
    batches: Sequence[Batch],
    repeats: int,
) -> list[Row]:
    """Returns float, PTQ and QAT (both simulated and in int8), each on all test batches."""
    fake = fq.fake_quant(ptq.model, ptq.plan)
    integers = int8_network(layers, ptq.int8)
    nothing: frozenset[str] = frozenset()
    in_float = int8_network(layers, nothing)
    ptq_int8, qat_int8 = deploy(layers, ptq), deploy(layers, qat)
    float_params = Deployed(dict(ptq.params), {})
    forwards: dict[str, tuple[Callable[[Batch], Value], object]] = {
        "float": (lambda b: in_float(float_params, b.x, b.maps), float_params),
        "PTQ, fake": (lambda b: fake(ptq.params, ptq.scales, b.x, b.maps), ptq.params),
        "PTQ, int8": (lambda b: integers(ptq_int8, b.x, b.maps), ptq_int8),
        "QAT, fake": (lambda b: fake(qat.params, qat.scales, b.x, b.maps), qat.params),
        "QAT, int8": (lambda b: integers(qat_int8, b.x, b.maps), qat_int8),
    }
    rows = []
    with torch.no_grad():
        for name, (forward, params) in forwards.items():
            logits = torch.cat([logits_of(forward(batch))[batch.row] for batch in batches])
            seconds = _seconds(forward, batches, repeats)
            rows.append(Row(name, logits, _bytes(params), 1e3 * seconds))
    return rows


def table(
    rows: Sequence[Row],
    labels: Tensor,
    metrics: Mapping[str, Callable[[Tensor, Tensor], float]],
    time_unit: str,
) -> str:
    """Returns the rows as text; agreement is the share of labels predicted as the first row does."""
    first = rows[0].logits.argmax(1)
    columns = [*metrics, "accuracy %", "agreement %"]
    head = "".join(f"{name:>13}" for name in columns)
    lines = [f"{'network':<12}{head}{'parameter bytes':>17}{time_unit:>13}"]
    for row in rows:
        predicted = row.logits.argmax(1)
        figures = [metric(predicted, labels) for metric in metrics.values()]
        figures += [accuracy(row.logits, labels), accuracy(row.logits, first)]
        text = "".join(f"{figure:>13.2f}" for figure in figures)
        lines.append(f"{row.name:<12}{text}{row.parameter_bytes:>17,}{row.milliseconds:>13.1f}")
    return "\n".join(lines)


def _seconds(forward: Callable[[Batch], Value], batches: Sequence[Batch], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        for batch in batches:
            start = time.perf_counter()
            forward(batch)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _bytes(params: object) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(params))
