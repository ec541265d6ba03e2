"""Recipes of `fquant quantize`: a YAML file, checked before anything runs.

    model: package.module:name      # a module, or a function without arguments that makes one
    params: trained.safetensors     # optional: {name: tensor}, a file of fquant.save or safetensors
    data: package.module:name       # batches, or a function without arguments that makes them
    rules:                          # first match wins
      - {kind: OpRule, path: head}  # as fquant.save_recipe writes them
      - w8a8                        # or a preset: w8a8, w4a8, w8, w4, fp8
    calibration:
      batches: 16                   # optional: how many at most
    export:
      weights: integer              # or float (the default)
      dynamic_batch: true           # whether axis 0 of every input may vary (the default)
    outputs:                        # at least one; paths are relative to the recipe
      state: state.safetensors      # params, plan, statistics, scales and rules, for fquant.load
      program: model.pt2            # the Q/DQ program, for torch.export.load
      onnx: model.onnx

Batches are tensors or records, tuples of positional arguments, or dicts of keyword ones. Modules are
looked for beside the recipe first.
"""

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

import fquant
from fquant.op_rules import OpRule
from fquant.optional import require_package
from fquant.recipes import from_dict

PRESETS = ("w8a8", "w4a8", "w8", "w4", "fp8")
OUTPUTS = ("state", "program", "onnx")
KEYS = {
    "": ("model", "params", "data", "rules", "calibration", "export", "outputs"),
    "calibration": ("batches",),
    "export": ("weights", "dynamic_batch"),
    "outputs": OUTPUTS,
}


class RecipeError(ValueError):
    """A recipe that is not right: the message names the file, the line, the key and what must be."""


class Recipe(NamedTuple):
    """A recipe with everything in it found.

    Attributes:
        model: the module.
        params: its parameters and buffers by name.
        batches: for calibration, at least one.
        rules: in order of precedence.
        weights: "float" or "integer".
        dynamic_batch: whether axis 0 of every input may vary.
        outputs: `{kind: path}`.
    """

    model: nn.Module
    params: dict[str, Tensor]
    batches: list[Any]
    rules: list[OpRule]
    weights: str
    dynamic_batch: bool
    outputs: dict[str, Path]


def read_recipe(path: Path) -> Recipe:
    """Returns the recipe in a file.

    Raises:
        RecipeError: the file is not there or not YAML, or a key or value is not right.
        ImportError: PyYAML is not installed.
    """
    yaml = require_package("yaml", "fquant quantize", "yaml")
    try:
        text = path.read_text()
        data, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise RecipeError(f"{path}: must be a file that can be read, got {error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f"{mark.line + 1}:"
        problem = getattr(error, "problem", None) or error
        raise RecipeError(f"{path}:{line} must be YAML, got {problem}.") from error
    return _Reader(path, data, node).recipe()


class _Reader:
    def __init__(self, path: Path, data: Any, node: Any) -> None:
        self.path, self.data, self.node = path, data, node

    def recipe(self) -> Recipe:
        for key, known in KEYS.items():
            self._known_keys(key, known)
        with _beside(self.path):
            model = self._made("model")
            batches = self._made("data")
        if not isinstance(model, nn.Module):
            raise self._error("model", f"must be an nn.Module, got {type(model).__name__}")
        if not isinstance(batches, Iterable):
            raise self._error("data", f"must be an iterable, got {type(batches).__name__}")
        limit = self._value("calibration.batches", int, None)
        if limit is not None and limit < 1:
            raise self._error("calibration.batches", f"must be at least 1, got {limit}")
        batches = list(islice(batches, limit))
        if not batches:
            raise self._error("data", "must have at least one batch, got none")
        if isinstance(batches[0], list):
            raise self._error(
                "data",
                "must give what the model takes, a tensor, a tuple of arguments or a dict of keyword "
                f"ones, got a list of {len(batches[0])}; of a loader of images and labels, write a "
                "function that yields the images",
            )
        weights = self._value("export.weights", str, "float")
        if weights not in ("float", "integer"):
            raise self._error("export.weights", f"must be 'float' or 'integer', got {weights!r}")
        outputs = self._value("outputs", dict, {})
        if not outputs:
            raise self._error("outputs", f"must name at least one of {', '.join(OUTPUTS)}")
        paths = {kind: self.path.parent / self._value(f"outputs.{kind}", str) for kind in outputs}
        for kind, place in paths.items():
            if not place.parent.is_dir():
                raise self._error(
                    f"outputs.{kind}", f"must be in a folder that is there, got {place}"
                )
        return Recipe(
            model,
            self._params(model),
            batches,
            self._rules(),
            weights,
            self._value("export.dynamic_batch", bool, True),
            paths,
        )

    def _params(self, model: nn.Module) -> dict[str, Tensor]:
        params = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        name = self._value("params", str, None)
        if name is not None:
            place = self.path.parent / name
            try:
                loaded = _read_params(place)
            except (OSError, ValueError) as error:
                raise self._error("params", f"must be a file of tensors, got {error}") from error
            for key, tensor in loaded.items():
                if key not in params:
                    raise self._error("params", f"must name tensors of the model, got {key!r}")
                if getattr(tensor, "shape", None) != params[key].shape:
                    raise self._error("params", f"{key!r} must be {tuple(params[key].shape)}")
            params.update(loaded)
        return {name: tensor.detach() for name, tensor in params.items()}

    def _rules(self) -> list[OpRule]:
        rules: list[OpRule] = []
        for i, item in enumerate(self._value("rules", list)):
            key = f"rules.{i}"
            if isinstance(item, str):
                if item not in PRESETS:
                    raise self._error(key, f"must be a rule or one of {PRESETS}, got {item!r}")
                rules += getattr(fquant, item)()
                continue
            try:
                rule = from_dict(item)
            except (TypeError, ValueError) as error:
                raise self._error(key, f"must be a rule: {str(error).rstrip('.')}") from error
            if not isinstance(rule, OpRule):
                raise self._error(key, f"must be a rule, got {item!r}")
            rules.append(rule)
        return rules

    def _made(self, key: str) -> Any:
        text = self._value(key, str)
        module, colon, name = text.partition(":")
        if not (module and colon and name):
            raise self._error(key, f"must be an import path like package.module:name, got {text!r}")
        try:
            value: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            raise self._error(key, f"must be in a module that is there, got {module!r}") from error
        for part in name.split("."):
            if not hasattr(value, part):
                raise self._error(key, f"must be there: {module!r} has no {name!r}")
            value = getattr(value, part)
        makes = callable(value) and not isinstance(value, nn.Module)
        return value() if makes else value

    def _known_keys(self, key: str, known: tuple[str, ...]) -> None:
        value = self.data if key == "" else self._value(key, dict, {})
        if not isinstance(value, Mapping):
            raise self._error(key, f"must be a mapping with keys among {', '.join(known)}")
        for name in value:
            if name not in known:
                place = f"{key}.{name}" if key else str(name)
                raise self._error(place, f"must be a key among {', '.join(known)}, got {name!r}")

    def _value(self, key: str, kind: type, *default: Any) -> Any:
        value = self.data
        for part in key.split("."):
            if part not in value:
                if default:
                    return default[0]
                raise self._error(key, "must be there")
            value = value[part]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._error(key, f"must be of type {kind.__name__}, got {value!r}")
        return value

    def _error(self, key: str, requirement: str) -> RecipeError:
        return RecipeError(
            f"{self.path}:{_line_of(self.node, key)}: {key or 'recipe'} {requirement}."
        )


def _line_of(node: Any, key: str) -> int:
    """The line of a key, or of the nearest thing around it that is there."""
    line = 1 if node is None else node.start_mark.line + 1
    for part in key.split("."):
        entries = getattr(node, "value", None)
        if not isinstance(entries, list):
            break
        if part.isdecimal() and int(part) < len(entries):
            node = entries[int(part)]
            line = node.start_mark.line + 1
            continue
        found = [pair for pair in entries if isinstance(pair, tuple) and pair[0].value == part]
        if not found:
            break
        name, node = found[0]
        line = name.start_mark.line + 1
    return line


def _read_params(path: Path) -> Mapping[str, Tensor]:
    safetensors = require_package("safetensors", "fquant quantize", "files")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != "fquant.tree":
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path.name}, which is not safetensors ({error}); a file of torch.save is a pickle: "
            "write fquant.save(path, torch.load(...))"
        ) from error
    loaded = fquant.load(path)
    if isinstance(loaded, Mapping) and isinstance(loaded.get("params"), Mapping):
        loaded = loaded["params"]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{type(loaded).__name__} in {path}")
    return loaded


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Lets imports find what is beside a file, while it lasts."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
