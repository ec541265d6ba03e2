"""Tables on standard output: by rich on a terminal that has it, as plain text elsewhere."""

import importlib.util
import sys
from collections.abc import Sequence


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table; in a pipe it is plain text, one line per row."""
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(*header, title=title, title_justify="left")
        for row in cells:
            table.add_row(*map(escape, row))
        Console().print(table)
    else:
        print(plain_table(title, header, cells))


def plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as text.

    Example:
        >>> print(plain_table("sizes", ["name", "bytes"], [["weight", "12"], ["b", "4"]]))
        sizes
          name    bytes
          weight  12
          b       4
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join([title, *lines])


def size_text(count: int) -> str:
    """Returns a number of bytes for people.

    Example:
        >>> size_text(512), size_text(371112)
        ('512 B', '371.1 kB')
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000 or unit == "MB":
            break
        count /= 1000  # type: ignore[assignment]
    return f"{count} B" if unit == "B" else f"{count:.1f} {unit}"
