"""`fquant quantize recipe.yaml`: a recipe followed from the model to the files."""

import math
from typing import Any

import torch
from torch.utils import _pytree as pytree

import fquant
from fquant.commands.recipe import Recipe
from fquant.commands.table import print_table, size_text
from fquant.formats import grid_name
from fquant.plan import Plan


def quantize_model(recipe: Recipe, progress: bool | None) -> None:
    """Plans, calibrates, writes the outputs and prints what was done.

    Args:
        recipe: what to do.
        progress: whether to show progress bars; None to show them if tqdm is installed.
    """
    first = recipe.batches[0]
    args: tuple[Any, ...] = () if isinstance(first, dict) else (first,)
    args = first if isinstance(first, tuple) else args
    kwargs = first if isinstance(first, dict) else {}
    model, params = recipe.model, recipe.params
    plan = fquant.make_plan(model, recipe.rules, args, kwargs)
    stats = fquant.calibrate_model(model, plan, params, recipe.batches, progress=progress)
    qstate = fquant.finalize(plan, stats)
    print_table(
        "quantizers", ("quantizer", "grid", "scales", "smallest", "largest"), _rows(plan, qstate)
    )
    for kind, path in recipe.outputs.items():
        if kind == "state":
            tree = {"params": params, "plan": plan, "stats": stats, "qstate": qstate}
            fquant.save(path, {**tree, "rules": recipe.rules})
    if recipe.outputs.keys() & {"program", "onnx"}:
        shapes = _varying_batch(args, kwargs) if recipe.dynamic_batch else None
        program = fquant.export_qdq(
            *(model, plan, params, qstate, args, kwargs),
            dynamic_shapes=shapes,
            weights=recipe.weights,
        )
        if "program" in recipe.outputs:
            fquant.graph.save_program(program, recipe.outputs["program"])
        if "onnx" in recipe.outputs:
            fquant.to_onnx(fquant.graph.fold_norms(program), recipe.outputs["onnx"])
    floats = sum(tensor.nbytes for tensor in params.values())
    rows = [
        (kind, path, size_text(path.stat().st_size), f"{path.stat().st_size / floats:.2f}")
        for kind, path in recipe.outputs.items()
    ]
    header = ("output", "file", "size", "of the float parameters")
    print_table(f"{len(recipe.batches)} batches, {size_text(floats)} of parameters", header, rows)


def _rows(plan: Plan, qstate: dict[str, Any]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for name, quantizer in plan.quantizers.items():
        scale = qstate.get(name)
        grid = grid_name(quantizer.spec)
        if scale is None:
            rows.append((name, grid, "dynamic", "", ""))
        else:
            low, high = (f"{value.item():.4g}" for value in (scale.min(), scale.max()))
            rows.append((name, grid, math.prod(scale.shape), low, high))
    return rows


def _varying_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shapes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.ndim > 0:
            shapes[leaf] = {0: torch.export.Dim.AUTO}
    return shapes
