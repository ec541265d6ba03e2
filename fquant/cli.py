"""The command line: `fquant demo`."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0 when it did its work, 1 when something it needs is missing."""
    parser = argparse.ArgumentParser(prog="fquant", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="train, calibrate, fine-tune and run in int8 a sparse network on real digits"
    )
    demo.add_argument("--epochs", type=int, default=15, help="of float training (default 15)")
    demo.add_argument("--qat-epochs", type=int, default=5, help="of fine-tuning (default 5)")
    demo.add_argument("--seed", type=int, default=0, help="of the initial weights (default 0)")
    demo.add_argument("--picture", type=Path, default=Path("demo.png"), help="default demo.png")
    demo.add_argument("--no-progress", action="store_true", help="no progress bars")
    return _demo(parser.parse_args(arguments))


def _demo(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("sklearn") is None:
        print(
            "fquant demo needs scikit-learn's digits: pip install 'fquant[demo]'", file=sys.stderr
        )
        return 1
    from fquant.demo.run import run_demo

    run_demo(
        options.epochs,
        options.qat_epochs,
        options.seed,
        options.picture,
        False if options.no_progress else None,
    )
    return 0
