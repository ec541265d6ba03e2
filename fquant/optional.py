"""Packages that only some functions need: the extras of fquant."""

import importlib
from typing import Any


def require_package(name: str, function: str, extra: str) -> Any:
    """Returns a module that an extra of fquant brings.

    Args:
        name: of the module.
        function: what needs it, for the message.
        extra: which extra has it.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"{function} needs {package}: pip install 'fquant[{extra}]'.") from error
