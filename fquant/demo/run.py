"""The demo from end to end."""

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fquant.demo.data import Batch, load_digits, make_batch
from fquant.demo.network import SITES, DigitNet
from fquant.demo.quantize import (
    Scales,
    activations_of,
    calibrate_scales,
    fake_quant_forward,
    int8_forward,
    to_int8,
)
from fquant.demo.report import Row, save_picture, signal_to_noise, table
from fquant.demo.training import Params, train

FLOAT_RATE = 4e-3
QAT_RATE = FLOAT_RATE / 10


class Result(NamedTuple):
    """What the demo measured on the test images.

    Attributes:
        rows: float, PTQ, QAT, int8, int8 compiled.
        labels: the right digits.
        equal_integers: share of int8 activations equal to those of the fake-quantized network.
        num_integers: how many activations were compared.
        different_classes: test images that int8 and fake quantization class differently.
        compiled_is_eager: whether compiled and eager int8 gave the same bits everywhere.
        mutated: whether any parameter, buffer or input changed; False.
    """

    rows: list[Row]
    labels: Tensor
    equal_integers: float
    num_integers: int
    different_classes: int
    compiled_is_eager: bool
    mutated: bool


def run_demo(
    epochs: int = 15,
    qat_epochs: int = 5,
    seed: int = 0,
    picture: Path | None = None,
    progress: bool | None = None,
) -> Result:
    """Trains, quantizes, fine-tunes and compares; prints the table and returns the figures."""
    split = load_digits()
    model = DigitNet(seed)
    before = copy.deepcopy(model.state_dict())
    initial = {name: p.detach() for name, p in model.named_parameters()}

    def float_forward(params: Params, batch: Batch) -> Tensor:
        return functional_call(model, params, (batch.x, batch.maps))

    params = train(
        float_forward,
        initial,
        split,
        epochs=epochs,
        rate=FLOAT_RATE,
        description="train in float",
        progress=progress,
    )
    scales = calibrate_scales(model, params, split, progress)
    tuned = train(
        lambda p, batch: fake_quant_forward(model, p, scales, batch)[0],
        params,
        split,
        epochs=qat_epochs,
        rate=QAT_RATE,
        description="fine-tune with fake quantization",
        progress=progress,
    )
    test = make_batch(split.test_images, split.test_labels)
    deployed = to_int8(tuned, scales)
    torch._dynamo.reset()
    compiled = torch.compile(int8_forward, fullgraph=True)

    with torch.no_grad():
        variants: dict[str, tuple[Callable[[], Tensor], object]] = {
            "float": (lambda: float_forward(params, test), params),
            "PTQ, fake": (lambda: fake_quant_forward(model, params, scales, test)[0], params),
            "QAT, fake": (lambda: fake_quant_forward(model, tuned, scales, test)[0], tuned),
            "int8": (lambda: int8_forward(deployed, scales.activations, test)[0], deployed),
            "int8, compiled": (lambda: compiled(deployed, scales.activations, test)[0], deployed),
        }
        rows = [
            Row(
                name,
                forward(),
                _bytes(parameters),
                _microseconds(forward, len(test.labels)),
            )
            for name, (forward, parameters) in variants.items()
        ]
        eager = int8_forward(deployed, scales.activations, test)
        same = pytree.tree_map(torch.equal, eager, compiled(deployed, scales.activations, test))
        fake_logits, fake = fake_quant_forward(model, tuned, scales, test)
        equal = [_levels(fake[s], scales.activations[s]) == eager[1][s] for s in SITES]
        noise = {
            "PTQ": _noise(model, params, scales, test),
            "QAT": _noise(model, tuned, scales, test),
        }
    result = Result(
        rows,
        test.labels,
        sum(int(e.sum()) for e in equal) / sum(e.numel() for e in equal),
        sum(e.numel() for e in equal),
        int((fake_logits.argmax(1) != eager[0].argmax(1)).sum()),
        all(pytree.tree_leaves(same)),
        not all(torch.equal(before[name], p) for name, p in model.state_dict().items()),
    )
    print(summary(result))
    if picture is not None:
        drawn = save_picture(picture, rows, test.labels, noise)
        print(f"picture: {picture}" if drawn else "picture: none, matplotlib is not installed")
    return result


def summary(result: Result) -> str:
    """Returns the table and the comparison of int8 with fake quantization as text."""
    return (
        f"\n{table(result.rows, result.labels)}\n\n"
        f"int8 against fake quantization: {100 * result.equal_integers:.4f} % of "
        f"{result.num_integers:,} activations are the same integer,\n"
        f"{result.different_classes} of {len(result.labels)} images are classed differently; "
        f"compiled int8 equals eager int8: {result.compiled_is_eager}.\n"
        f"The module was mutated: {result.mutated}."
    )


def _levels(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().to(torch.int8)


def _noise(model: DigitNet, params: Params, scales: Scales, batch: Batch) -> dict[str, float]:
    """Signal-to-noise at each site: the float network with these parameters against the quantized."""
    exact = activations_of(model, params, batch)
    _, rounded = fake_quant_forward(model, params, scales, batch)
    return {site: signal_to_noise(exact[site], rounded[site]) for site in SITES}


def _bytes(params: object) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(params))


def _microseconds(forward: Callable[[], object], images: int) -> float:
    """Median of 15 runs, per image; the first run is not counted."""
    forward()
    times = []
    for _ in range(15):
        start = time.perf_counter()
        forward()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / images * 1e6
