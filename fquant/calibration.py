"""Calibration: a fold of observers over batches."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from fquant.observers import Observer
from fquant.progress import progress_bar

Batch = TypeVar("Batch")
Stats = Mapping[str, Any]


def calibrate(
    activations: Callable[[Batch], Mapping[str, Tensor]],
    batches: Iterable[Batch],
    observers: Mapping[str, Observer],
    stats: Stats | None = None,
    *,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Returns the observers' states after all batches: `{site: state}`.

    Args:
        activations: the tensors to observe in one batch, `{site: tensor}`; a pure function, for
            example a forward pass that returns what its sites saw. It may be compiled. It may leave
            sites out, and may return sites without an observer, which are ignored.
        batches: what `activations` is called with, one at a time.
        observers: which observer watches which site.
        stats: states to go on from, for example of an earlier call; None to start afresh.
        progress: whether to show a progress bar (tqdm); None to show one if tqdm is installed.

    Raises:
        ValueError: stats has a site without an observer, or a batch's shape does not fit the
            state; the message names the site.

    Example:
        >>> def layer(x):
        ...     return {"input": x, "output": x.relu()}
        >>> observers = {"output": fquant.MaxObserver()}
        >>> stats = calibrate(layer, [torch.tensor([1.0, -9.0]), torch.tensor([2.0])], observers)
        >>> fquant.observed_amax(stats, observers)
        {'output': tensor(2.)}
    """
    states = {site: observer.init() for site, observer in observers.items()}
    if stats is not None:
        _require_observers("calibrate", stats, observers)
        states.update(stats)
    for batch in progress_bar(batches, "calibrate", progress):
        seen = activations(batch)
        for site, observer in observers.items():
            if site in seen:
                states[site] = at_site(site, observer.update, states[site], seen[site])
    return states


def merge_stats(a: Stats, b: Stats, observers: Mapping[str, Observer]) -> dict[str, Any]:
    """Returns the statistics of a's batches followed by b's, site by site.

    Exact and independent of order for observers whose merge is (max); sites that only one side has
    are taken as they are.

    Raises:
        ValueError: a site has no observer, or the states do not fit; the message names the site.
    """
    _require_observers("merge_stats", {**a, **b}, observers)
    merged = {**a, **b}
    for site in a.keys() & b.keys():
        merged[site] = at_site(site, observers[site].merge, a[site], b[site])
    return merged


def observed_amax(stats: Stats, observers: Mapping[str, Observer]) -> dict[str, Tensor]:
    """Returns `{site: amax}`, what each observer makes of its state.

    Raises:
        ValueError: a site was never observed (the message names it) or has no observer.
    """
    _require_observers("observed_amax", stats, observers)
    return {site: at_site(site, observers[site].amax, state) for site, state in stats.items()}


def _require_observers(function: str, stats: Stats, observers: Mapping[str, Observer]) -> None:
    missing = sorted(stats.keys() - observers.keys())
    if missing:
        raise ValueError(f"{function}: observers must have every site of stats, lacks {missing}.")


def at_site(site: str, function: Callable[..., Any], *args: Any) -> Any:
    """Returns function(*args); a ValueError from it names the site."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"site {site!r}: {error}") from error


def require_sites(function: str, argument: str, given: Stats, wanted: Iterable[str]) -> None:
    """Raises unless a tree is a dict with exactly the names wanted."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{function}: {argument} must be a dict by quantizer, got {type(given).__name__}."
        )
    count = 0
    for name in wanted:
        count += 1
        if name not in given:
            raise ValueError(
                f"{function}: {argument} must have every calibrated quantizer of the plan, "
                f"lacks {name!r}."
            )
    if len(given) != count:
        others = sorted(set(given) - set(wanted))
        raise ValueError(f"{function}: {argument} must be of this plan, got {others}, not in it.")


def state_types(observers: Mapping[str, Observer]) -> dict[str, type]:
    """Returns the kind of state that each observer has."""
    return {site: type(observer.init()) for site, observer in observers.items()}


def require_stats(function: str, stats: Stats, kinds: Mapping[str, type]) -> None:
    """Raises ValueError unless stats have exactly the sites wanted, each with its observer's state."""
    require_sites(function, "stats", stats, kinds)
    for site, kind in kinds.items():
        if type(stats[site]) is not kind:
            raise ValueError(
                f"{function}: stats must be of this plan, with {kind.__name__} at site {site!r}, "
                f"got {type(stats[site]).__name__}."
            )
