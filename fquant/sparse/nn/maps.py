"""How modules share kernel maps: found in the record by key, or built and handed on in the next one.

A map's key is the module's `indice_key`, as in spconv, or else its geometry behind the keys that led
to the cells, so that layers of one geometry at the same cells share it without being told.
"""

from collections.abc import Mapping
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.func import functional_call

from fquant.checks import values_readable
from fquant.interception.shadow import shadow_of
from fquant.sparse.combine import union_maps
from fquant.sparse.geometry import Geometry
from fquant.sparse.kernel_map import KernelMap, build_map, transpose_map
from fquant.sparse.tensor import SparseTensor

Maps = Mapping[str, KernelMap]
_BUILT: ContextVar[dict[str, KernelMap] | None] = ContextVar("maps built", default=None)


def with_maps(model: nn.Module, x: SparseTensor) -> SparseTensor:
    """Returns x with every kernel map that the model's modules will look for.

    What compiled code, export and `make_plan` are to be given: maps depend on values, which they do
    not read. The model is run in eval mode on the cells and on features without data, so this costs
    what the maps cost. The model is not written.

    Args:
        model: takes one SparseTensor.
        x: its cells matter; maps it has already are kept.

    Raises:
        TypeError: x is no SparseTensor of float features.
        ValueError: the model reads values of features; or what its modules raise.

    Example:
        >>> from fquant.sparse import SparseTensor, nn
        >>> x = SparseTensor.from_dense(torch.tensor([[[0.0, 5.0, 7.0]]]))
        >>> model = nn.SparseSequential(nn.SubMConv1d(1, 4, 3), nn.SparseConv1d(4, 4, 2, stride=2))
        >>> list(with_maps(model, x).maps)
        ['subm k3', 'conv k2 s2']
    """
    if not isinstance(x, SparseTensor) or not isinstance(x.features, Tensor):
        got = type(getattr(x, "features", x)).__name__
        raise TypeError(f"with_maps: x must be a SparseTensor of float features, got {got}.")
    shadow = shadow_of(model, {}, train=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = {**dict(shadow.named_parameters()), **dict(shadow.named_buffers())}
    state: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
    built: dict[str, KernelMap] = {}
    token = _BUILT.set(built)
    try:
        with torch.no_grad():
            features = mode.from_tensor(x.features.detach())
            functional_call(shadow, state, (x.with_features(features),))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"with_maps: {type(model).__name__} must not read values of features, which have none here."
        ) from error
    finally:
        _BUILT.reset(token)
    return with_new_maps(x, built)


def with_new_maps(x: SparseTensor, maps: Maps) -> SparseTensor:
    """Returns x with more kernel maps; those it has stay."""
    merged = {**maps, **(x.maps or {})} or None
    return SparseTensor(x.features, x.coords, x.spatial_shape, x.batch_size, merged, x.cells)


def find_map(
    owner: str, x: SparseTensor, geometry: Geometry, indice_key: str | None
) -> tuple[str, KernelMap]:
    """Returns (key, map) of a geometry at the cells of x.

    Raises:
        TypeError: x is no SparseTensor.
        ValueError: indice_key is that of other cells or another geometry; the map is not there and
            cannot be built, because values cannot be read.
    """
    _require_record(owner, x)
    key = indice_key or "/".join((*x.cells, geometry.name))
    known = (x.maps or {}).get(key)
    if known is None:
        _require_readable(owner, key, x)
        kernel_map = build_map(x, geometry)
        _collect(key, kernel_map)
        return key, kernel_map
    if known.geometry != geometry.name:
        raise ValueError(
            f"{owner}: indice_key {key!r} must name a map of this geometry, {geometry.name}, "
            f"got {known.geometry}."
        )
    _require_cells(owner, key, x, known)
    return key, known


def find_inverse_map(owner: str, x: SparseTensor, indice_key: str) -> tuple[str, KernelMap]:
    """Returns (key, map) back from the outputs of the map that `indice_key` names, to its inputs.

    Raises:
        TypeError: x is no SparseTensor.
        ValueError: x has no such map, or is not at its outputs.
    """
    _require_record(owner, x)
    maps = x.maps or {}
    if indice_key not in maps or not x.cells or x.cells[-1] != indice_key:
        raise ValueError(
            f"{owner}: indice_key must name the convolution or pool that made the cells of x, "
            f"{x.cells[-1:]}, got {indice_key!r}."
        )
    key = f"{indice_key} inverse"
    forward = maps[indice_key]
    back = maps.get(key)
    if back is None:
        back = transpose_map(forward)  # reads no values: it can be traced
        _collect(key, back)
    _require_cells(owner, key, x, back)
    return key, back


def find_union_maps(owner: str, *tensors: SparseTensor) -> dict[str, KernelMap]:
    """Returns {key: map} of the union of the tensors' cells, in the order of the tensors."""
    for x in tensors:
        _require_record(owner, x)
    name = " + ".join("/".join(x.cells) or "input" for x in tensors)
    keys = [f"union {i} of {name}" for i in range(len(tensors))]
    maps = {key: m for x in tensors for key, m in (x.maps or {}).items() if key in keys}
    if len(maps) < len(keys):
        _require_readable(owner, keys[0], *tensors)
        maps = dict(zip(keys, union_maps(*tensors), strict=True))
        for key, m in maps.items():
            _collect(key, m)
    for key, x in zip(keys, tensors, strict=True):
        _require_cells(owner, key, x, maps[key])
    return {key: maps[key] for key in keys}


def moved(x: SparseTensor, y: SparseTensor, maps: Maps, cells: tuple[str, ...]) -> SparseTensor:
    """Returns y, computed from x, with the maps of both and the name of its cells."""
    merged = {**(x.maps or {}), **maps}
    return SparseTensor(y.features, y.coords, y.spatial_shape, y.batch_size, merged, cells)


def step_name(geometry: Geometry, indice_key: str | None) -> str:
    """Returns the element that a map adds to the name of the cells."""
    return indice_key or geometry.name


def _collect(key: str, kernel_map: KernelMap) -> None:
    """For `with_maps`, while it runs in this context."""
    if torch.compiler.is_compiling():
        return
    built = _BUILT.get()
    if built is not None:
        built[key] = kernel_map


def _require_record(owner: str, x: object) -> None:
    if not isinstance(x, SparseTensor):
        hint = ""
        if type(x).__name__ == "SparseConvTensor":
            hint = " fquant.interop.spconv's from_spconv(x) is one; SparseTensor has its arguments."
        elif isinstance(x, Tensor):
            hint = " A SparseSequential hands features to modules that are not SparseModules."
        raise TypeError(f"{owner}: x must be a SparseTensor, got {type(x).__name__}.{hint}")


def _require_readable(owner: str, key: str, *tensors: SparseTensor) -> None:
    if not values_readable(*(x.coords for x in tensors)):
        raise ValueError(
            f"{owner}: x.maps must have {key!r} where values cannot be read (under torch.compile, "
            "export, make_plan). fquant.sparse.nn.with_maps(model, x) puts it there; a model that makes "
            "x itself is planned with make_plan(..., fake=False)."
        )


def _require_cells(owner: str, key: str, x: SparseTensor, known: KernelMap) -> None:
    """Raises unless a map reads the cells of x: by identity, or by value where that can be read."""
    same = known.in_coords is x.coords or (
        known.in_shape == x.spatial_shape and known.in_coords.shape == x.coords.shape
    )
    if same and known.in_coords is not x.coords and values_readable(x.coords, known.in_coords):
        same = torch.equal(known.in_coords, x.coords.to(known.in_coords))
    if not same:
        raise ValueError(
            f"{owner}: map {key!r} must be one of the cells of x, {x.coords.shape[0]} in a grid of "
            f"{x.spatial_shape}, got one of {known.in_coords.shape[0]} others in {known.in_shape}."
        )
