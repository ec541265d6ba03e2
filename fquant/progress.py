"""Progress bars, by tqdm where it is installed (`pip install fquant[progress]`)."""

import importlib.util
from collections.abc import Iterable, Iterator
from typing import TypeVar

from fquant.optional import require_package

T = TypeVar("T")


def progress_bar(items: Iterable[T], description: str, show: bool | None) -> Iterator[T]:
    """Yields the items, drawing a bar on standard error.

    Args:
        items: anything iterable; the bar has a total when it has a length.
        description: what the bar is called.
        show: True, False, or None to show it if tqdm is installed.

    Raises:
        ImportError: `show=True` without tqdm.
    """
    if show is None:
        show = importlib.util.find_spec("tqdm") is not None
    if not show:
        return iter(items)
    tqdm = require_package("tqdm", "A progress bar", "progress")
    return iter(tqdm.tqdm(items, desc=description, leave=False))
