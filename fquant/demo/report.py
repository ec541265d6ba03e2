"""What the demo measured, as a table and as a picture."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """One variant of the network on the test images.

    Attributes:
        name: float, PTQ, QAT, int8, ...
        logits: `(images, 10)`.
        parameter_bytes: size of its parameters with their scales.
        microseconds: time per image, kernel maps built beforehand.
    """

    name: str
    logits: Tensor
    parameter_bytes: int
    microseconds: float


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of images whose largest logit is the right digit."""
    return 100.0 * (logits.argmax(1) == labels).double().mean().item()


def table(rows: list[Row], labels: Tensor) -> str:
    """Returns the rows as text; agreement is the share of images classed as the first row does."""
    lines = [
        f"{'network':<18}{'accuracy %':>11}{'agreement %':>13}{'parameter bytes':>17}{'us / image':>12}"
    ]
    for row in rows:
        agreement = accuracy(row.logits, rows[0].logits.argmax(1))
        lines.append(
            f"{row.name:<18}{accuracy(row.logits, labels):>11.2f}{agreement:>13.2f}"
            f"{row.parameter_bytes:>17,}{row.microseconds:>12.1f}"
        )
    return "\n".join(lines)


def signal_to_noise(signal: Tensor, approximation: Tensor) -> float:
    """Returns 10 log10(sum signal^2 / sum (signal - approximation)^2), in decibels."""
    noise = (signal.double() - approximation.double()).square().sum()
    return (10 * torch.log10(signal.double().square().sum() / noise)).item()


def save_picture(
    path: Path, rows: list[Row], labels: Tensor, noise: dict[str, dict[str, float]]
) -> bool:
    """Draws accuracy and per-layer signal-to-noise; returns whether matplotlib was there to do it."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    names = [row.name for row in rows]
    values = [accuracy(row.logits, labels) for row in rows]
    bars = left.barh(names[::-1], values[::-1], color="#4878a8")
    left.bar_label(bars, fmt="%.2f", padding=-34, color="white")
    left.set_xlim(min(values) - 3, 100)
    left.set_xlabel(f"accuracy on {len(labels)} test images, %")
    for (name, by_site), marker in zip(noise.items(), "os^", strict=False):
        right.plot(list(by_site), list(by_site.values()), marker=marker, label=name)
    right.set_ylabel("signal-to-noise of activations, dB")
    right.set_xlabel("site, from input to output")
    right.grid(alpha=0.3)
    right.legend()
    figure.savefig(path, dpi=130)
    return True
