"""Choosing scales by what they do to the whole model, after calibration."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

FACTORS = (0.6, 0.7, 0.8, 0.9)


def search_scales(
    loss: Callable[[dict[str, Tensor]], Tensor],
    qstate: Mapping[str, Tensor],
    names: Iterable[str] | None = None,
    factors: Sequence[float] = FACTORS,
) -> dict[str, Tensor]:
    """Returns qstate with scales shrunk where that lowers a loss, one quantizer after the other.

    Coordinate descent, once through: `scale * factor` for the best factor, or scale as it was. Clipping
    a few large values often costs less than the coarser grid that holds them.

    Args:
        loss: a function of qstate to a 0-d tensor, for example the squared error of the logits on
            calibration data. Called `1 + len(names) * len(factors)` times.
        qstate: `{quantizer: scale}` from `fquant.finalize`.
        names: the quantizers to try; None for all.
        factors: what to multiply a scale by.

    Raises:
        ValueError: names has a quantizer that qstate has not.

    Example:
        >>> x = torch.tensor([0.1, -0.22, 0.31, 0.5])
        >>> spec = fquant.QuantSpec(num_bits=3)
        >>> def loss(q):
        ...     return (fquant.fake_quantize(x, q["x"], spec=spec) - x).square().sum()
        >>> search_scales(loss, {"x": torch.tensor(0.3)}, factors=(0.5, 0.75, 1.0))
        {'x': tensor(0.1500)}
    """
    best = dict(qstate)
    chosen = list(best) if names is None else list(names)
    missing = [name for name in chosen if name not in best]
    if missing:
        raise ValueError(f"search_scales: names must be quantizers of qstate, got {missing}.")
    lowest = float(loss(best))
    for name in chosen:
        scale = best[name]
        for factor in factors:
            trial = {**best, name: scale * factor}
            value = float(loss(trial))
            if value < lowest:
                lowest, best = value, trial
    return best
