"""The command line: `fquant demo`, `doctor`, `inspect` and `quantize`.

Every command ends with 0 when it did its work, 2 when it was called wrongly or its recipe is not right,
and 1 when something is missing or failed; what was wrong is the last line of standard error. Where
code of the user's failed, a model or its data, the lines before show where.
"""

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (see the module)."""
    parser = argparse.ArgumentParser(
        prog="fquant", description="Quantization as pure functions for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="train, calibrate, fine-tune and run in int8 a sparse network on real digits"
    )
    demo.add_argument("--epochs", type=int, default=15, help="of float training (default 15)")
    demo.add_argument("--qat-epochs", type=int, default=5, help="of fine-tuning (default 5)")
    demo.add_argument("--seed", type=int, default=0, help="of the initial weights (default 0)")
    demo.add_argument("--picture", type=Path, default=Path("demo.png"), help="default demo.png")
    demo.add_argument("--no-progress", action="store_true", help="no progress bars")
    demo.set_defaults(run=_demo)
    doctor = commands.add_parser(
        "doctor", help="say which kernels serve which op here, and test them against the reference"
    )
    doctor.add_argument("--seconds", type=float, default=5.0, help="of testing (default 5)")
    doctor.set_defaults(run=_doctor)
    inspect = commands.add_parser(
        "inspect", help="say what a file holds: saved trees, network cards, programs, ONNX models"
    )
    inspect.add_argument("file", type=Path, metavar="FILE", help=".safetensors, .pt2 or .onnx")
    inspect.set_defaults(run=_inspect)
    quantize = commands.add_parser(
        "quantize", help="plan, calibrate and export a model as a recipe in YAML says"
    )
    quantize.add_argument("recipe", type=Path, metavar="RECIPE", help="see fquant.commands.recipe")
    quantize.add_argument("--no-progress", action="store_true", help="no progress bars")
    quantize.set_defaults(run=_quantize)
    options = parser.parse_args(arguments)
    return int(options.run(options))


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


def _doctor(options: argparse.Namespace) -> int:
    import torch

    import fquant_kernels

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    found = fquant_kernels.backends()
    for backend in found:
        print(backend)
    if all(backend.unavailable is not None for backend in found):
        print("every op is served by its reference, in plain torch")
    print(f"\nself-test against the reference, {options.seconds:g} s")
    checks = fquant_kernels.self_test(options.seconds)
    for check in checks:
        verdict = "equal" if check.failure is None else f"WRONG, {check.failure}"
        print(f"{check.backend}: {check.cases} cases, {verdict}")
    return 0 if all(check.failure is None for check in checks) else 1


def _inspect(options: argparse.Namespace) -> int:
    from fquant.commands.inspect import inspect_file

    try:
        inspect_file(options.file)
    except FileNotFoundError as error:
        return _failed("inspect", error, 2)
    except (ValueError, ImportError, OSError) as error:
        return _failed("inspect", error, 1)
    return 0


def _quantize(options: argparse.Namespace) -> int:
    from fquant.commands.quantize import quantize_model
    from fquant.commands.recipe import RecipeError, read_recipe

    try:
        recipe = read_recipe(options.recipe)
        quantize_model(recipe, False if options.no_progress else None)
    except RecipeError as error:
        return _failed("quantize", error, 2)
    except Exception as error:  # a model or data of the user's may raise anything
        traceback.print_exc()
        return _failed("quantize", error, 1)
    return 0


def _failed(command: str, error: Exception, code: int) -> int:
    print(f"fquant {command}: {type(error).__name__}: {error}", file=sys.stderr)
    return code
