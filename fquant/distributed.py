"""Calibration over several processes: each observes its own batches, then all merge what they saw."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fquant.calibration import Stats, merge_stats
from fquant.observers import Observer


def merge_stats_over_ranks(
    stats: Stats, observers: Mapping[str, Observer], group: Any = None
) -> dict[str, Any]:
    """Returns the statistics of all processes, the same on every one: one exchange, then `merge_stats`.

    Merged in the order of ranks. For maxima, minima and histograms the result is, bit for bit, that of
    one process that saw all batches in any order; a moving average depends on the order.

    Args:
        stats: what this process observed, `{quantizer: state}`.
        observers: of the plan, the same on every process (`plan.observers`).
        group: a process group of torch.distributed; None for the default one.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        ValueError: as `merge_stats`.
    """
    if not torch.distributed.is_initialized():
        raise RuntimeError(
            "merge_stats_over_ranks: torch.distributed must be initialized, got no process group. "
            "One process has nothing to merge."
        )
    leaves, structure = pytree.tree_flatten(dict(stats))
    everyone: list[Any] = [None] * torch.distributed.get_world_size(group)
    mine = ([leaf.cpu() for leaf in leaves], list(stats))
    torch.distributed.all_gather_object(everyone, mine, group=group)
    states = []
    for theirs, names in everyone:
        if names != list(stats):
            raise ValueError(
                "merge_stats_over_ranks: stats must have the same sites in the same order on every "
                f"rank, got {names} beside {list(stats)}."
            )
        on_device = [
            theirs_leaf.to(leaf.device) for theirs_leaf, leaf in zip(theirs, leaves, strict=True)
        ]
        states.append(pytree.tree_unflatten(on_device, structure))
    return reduce(lambda a, b: merge_stats(a, b, observers), states)
