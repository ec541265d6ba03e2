"""Rounding to integers, by name; the one place where a mode is defined."""

import torch
from torch import Tensor

from fquant.checks import require_floating

STOCHASTIC = "stochastic"
ROUNDINGS = ("half_even", "half_away", "floor", "ceil", "toward_zero", STOCHASTIC)


def require_rounding(owner: str, rounding: str) -> None:
    """Raises ValueError, listing the modes, unless `rounding` is one of them."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"{owner}: rounding must be one of {list(ROUNDINGS)}, got {rounding!r}.")


def round_to_integer(x: Tensor, rounding: str = "half_even", noise: Tensor | None = None) -> Tensor:
    """Returns x rounded to integers, in its float dtype; exact, NaN and infinities kept.

        half_even      nearest, ties to the even integer
        half_away      nearest, ties away from zero
        floor, ceil    down, up
        toward_zero    truncated
        stochastic     up where noise < x - floor(x), so that the expectation over uniform noise is x

    Args:
        x: floating point.
        rounding: one of `ROUNDINGS`.
        noise: for stochastic rounding, uniform on [0, 1), broadcasts to x.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: an unknown rounding; stochastic rounding without noise that broadcasts to x.

    Example:
        >>> x = torch.tensor([0.5, 1.5, -2.5])
        >>> round_to_integer(x).tolist(), round_to_integer(x, "half_away").tolist()
        ([0.0, 2.0, -2.0], [1.0, 2.0, -3.0])
        >>> round_to_integer(x, "stochastic", torch.tensor([0.4, 0.6, 0.6])).tolist()
        [1.0, 1.0, -3.0]
    """
    require_floating("round_to_integer", "x", x)
    if rounding == "half_even":
        return x.round()
    if rounding == "half_away":
        whole = x.trunc()  # x - whole is exact, whereas x + 0.5 rounds 0.49999997 up
        return whole + torch.where((x - whole).abs() >= 0.5, x.sign(), 0.0)
    if rounding == "floor":
        return x.floor()
    if rounding == "ceil":
        return x.ceil()
    if rounding == "toward_zero":
        return x.trunc()
    require_rounding("round_to_integer", rounding)
    if noise is None:
        raise ValueError(
            "round_to_integer: noise must be a tensor for stochastic rounding, got None."
        )
    _require_broadcasts("round_to_integer", noise, x)
    low = x.floor()
    return low + (noise < x - low).to(x.dtype)


def uniform_noise(
    function: str,
    x: Tensor,
    rounding: str,
    noise: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor | None:
    """Returns the noise to round x with: the one given, or one drawn from the generator, or None.

    Raises:
        ValueError: stochastic rounding without exactly one source of noise; noise or a generator
            with a rounding that would ignore it; noise that does not broadcast to x.
        TypeError: noise is not a floating-point tensor, generator not a torch.Generator.
    """
    sources = (noise is not None) + (generator is not None)
    if rounding != STOCHASTIC:
        if sources:
            raise ValueError(
                f"{function}: noise and generator must be None unless the rounding is "
                f"'{STOCHASTIC}', got them with {rounding!r}."
            )
        return None
    if sources != 1:
        raise ValueError(
            f"{function}: either noise or generator must be given for stochastic rounding, "
            f"got {'both' if sources else 'neither'}."
        )
    if noise is None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"{function}: generator must be a torch.Generator, got {generator!r}.")
        return torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        raise TypeError(f"{function}: noise must be a floating-point tensor, got {noise!r}.")
    _require_broadcasts(function, noise, x)
    return noise.detach().to(x.dtype)


def _require_broadcasts(function: str, noise: Tensor, x: Tensor) -> None:
    leading = x.ndim - noise.ndim
    met = zip(noise.shape, x.shape[max(leading, 0) :], strict=False)
    if leading < 0 or any(n not in (1, s) for n, s in met):
        raise ValueError(
            f"{function}: noise must have a shape that broadcasts to x's {tuple(x.shape)}, "
            f"got {tuple(noise.shape)}."
        )
