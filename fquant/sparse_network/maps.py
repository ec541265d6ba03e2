"""The kernel maps of a network: one per geometry, from the cells of its input."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from fquant.checks import values_readable
from fquant.sparse import KernelMap, SparseTensor, conv_map, subm_map, transpose_map, with_pairs
from fquant.sparse.kernel_map import Cells
from fquant.sparse_network.layer import NETWORK_INPUT, Layer, with_inputs

Maps = dict[str, KernelMap]


class MapRecipe(NamedTuple):
    """How a layer's map is built; layers with equal ones share it.

    Attributes:
        reads: the key of the map whose outputs are the cells it reads, "input" at first.
        writes: the same for the cells it writes.
        kind: "subm", "conv", or "inverse", whose `reads` is the convolution undone.
        kernel_size: taps per axis; this and the next as in `Layer`.
        stride: input cells per output cell.
        padding: cells of zeros around the grid.
        dilation: cells between taps.
    """

    reads: str
    writes: str
    kind: str
    kernel_size: int | tuple[int, ...]
    stride: int | tuple[int, ...]
    padding: int | tuple[int, ...]
    dilation: int | tuple[int, ...]

    @property
    def key(self) -> str:
        """The name of the map."""
        if self.kind == "subm":
            return f"{self.reads}/subm{self.kernel_size}{_spaced(self.dilation)}"
        return self.writes if self.kind == "conv" else f"{self.reads}/inverse"


def geometries(layers: Sequence[Layer]) -> dict[str, MapRecipe]:
    """Returns the geometry of each layer that has a map, by the layer's name.

    Raises:
        ValueError: a layer joins values that lie at different cells.
    """
    cells = {NETWORK_INPUT: NETWORK_INPUT}
    found: dict[str, MapRecipe] = {}
    for layer in with_inputs(layers):
        here = cells[layer.inputs[0]]
        cells[layer.name] = here
        if any(cells[name] != here for name in layer.inputs):
            raise ValueError(
                f"geometries: layer {layer.name!r}: inputs must lie at the same cells, "
                f"got {[cells[name] for name in layer.inputs]}."
            )
        size = layer.kernel_size
        if layer.op == "subm":
            found[layer.name] = MapRecipe(here, here, "subm", size, 1, 0, layer.dilation)
        elif layer.op in ("conv", "max_pool"):
            sizes = (size, layer.stride, layer.padding, layer.dilation)
            key = f"{here}/conv{size}s{layer.stride}p{layer.padding}{_spaced(layer.dilation)}"
            found[layer.name] = MapRecipe(here, key, "conv", *sizes)
            cells[layer.name] = key
        elif layer.op == "inverse":
            down = found[layer.undoes]
            if here != down.writes or size != down.kernel_size:
                raise ValueError(
                    f"geometries: layer {layer.name!r}: undoes must name a convolution with its cells "
                    f"and kernel size, {here} and {size}, got {down.writes} and {down.kernel_size}."
                )
            found[layer.name] = MapRecipe(down.writes, down.reads, "inverse", size, 1, 0, 1)
            cells[layer.name] = down.reads
        if layer.residual and cells[layer.residual] != cells[layer.name]:
            raise ValueError(
                f"geometries: layer {layer.name!r}: residual must lie at the cells it writes, "
                f"{cells[layer.name]}, got {cells[layer.residual]}."
            )
    return found


def make_maps(layers: Sequence[Layer], x: SparseTensor | KernelMap, *, pairs: bool = False) -> Maps:
    """Returns every kernel map of a network, `{key: map}`: what is called its rulebook.

    They depend on the cells of x alone. Layers of the same geometry share one.

    Args:
        layers: the network.
        x: its input, or a map that writes those cells.
        pairs: whether to list the pairs of maps that several convolutions share (`with_pairs`): for
            `int8_network` on a CPU.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.ones(1, 1, 4))
        >>> layers = [Layer("a", "subm", (1, 2)), Layer("b", "subm", (2, 2))]
        >>> layers.append(Layer("c", "conv", (2, 2), 2, 2))
        >>> sorted(make_maps(layers, x))
        ['input/conv2s2p0', 'input/subm3']
    """
    maps: Maps = {}
    found = geometries(layers)
    for geometry in found.values():
        if geometry.key in maps:
            continue
        if geometry.kind == "inverse":
            maps[geometry.key] = transpose_map(maps[geometry.reads])
            continue
        cells: Cells = x if geometry.reads == NETWORK_INPUT else maps[geometry.reads]
        if geometry.kind == "subm":
            maps[geometry.key] = subm_map(cells, geometry.kernel_size, geometry.dilation)
        else:
            sizes = (geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation)
            maps[geometry.key] = conv_map(cells, *sizes)
    if pairs:
        users = Counter(found[layer.name].key for layer in layers if layer.is_convolution)
        shared = [key for key, count in users.items() if count > 1]
        maps |= {key: with_pairs(maps[key]) for key in shared}
    return maps


def first_key(layers: Sequence[Layer]) -> str | None:
    """Returns the key of the first map that reads the network's input; None if there is none."""
    found = geometries(layers).values()
    return next((g.key for g in found if g.reads == NETWORK_INPUT and g.kind != "inverse"), None)


def require_cells(function: str, x: SparseTensor, maps: Maps, key: str | None) -> None:
    """Raises ValueError unless the map of `first_key` is of x's cells, where they can be read."""
    if key is None:
        return
    if key not in maps:
        raise ValueError(f"{function}: maps must be make_maps(layers, x), lacks {key!r}.")
    known = maps[key].in_coords
    if known is x.coords or known.shape != x.coords.shape or not values_readable(known, x.coords):
        return
    if not torch.equal(known, x.coords.to(known)):
        raise ValueError(
            f"{function}: maps must be of the cells of x, make_maps(layers, x), got those of others."
        )


def _spaced(dilation: int | tuple[int, ...]) -> str:
    return "" if dilation == 1 else f"d{dilation}"


class MapCache(NamedTuple):
    """The maps of scenes seen lately, by the content of their coordinates.

    Attributes:
        entries: `{digest: maps}`, the least recently used first.
        capacity: how many scenes are kept.
        hits: how many lookups found their scene.
        misses: how many did not.
    """

    entries: Mapping[str, Maps]
    capacity: int
    hits: int = 0
    misses: int = 0

    @classmethod
    def empty(cls, capacity: int) -> MapCache:
        """Returns a cache without scenes.

        Raises:
            ValueError: capacity is not positive.
        """
        if capacity < 1:
            raise ValueError(f"MapCache.empty: capacity must be positive, got {capacity}.")
        return cls({}, capacity)


def cached_maps(layers: Sequence[Layer], x: SparseTensor, cache: MapCache) -> tuple[Maps, MapCache]:
    """Returns (maps, cache): those of the cache if it has the very same cells, else newly made ones.

    The cache that comes back has the scene as its most recent; the one given is as it was. Scenes are
    told apart by a 128-bit BLAKE2 digest of coordinates, grid, batch size and the network's geometries.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.ones(1, 1, 4))
        >>> layers = [Layer("a", "subm", (1, 2))]
        >>> maps, cache = cached_maps(layers, x, MapCache.empty(2))
        >>> again, cache = cached_maps(layers, x, cache)
        >>> again is maps, cache.hits, cache.misses
        (True, 1, 1)
    """
    digest = hashlib.blake2b(digest_size=16)
    made_of = (x.spatial_shape, x.batch_size, x.coords.dtype, x.coords.device, x.coords.shape)
    digest.update(repr((made_of, geometries(layers))).encode())
    digest.update(x.coords.detach().cpu().contiguous().numpy().data)
    key = digest.hexdigest()
    found = cache.entries.get(key)
    maps = make_maps(layers, x) if found is None else found
    others = {k: v for k, v in cache.entries.items() if k != key}
    kept = list(others.items())[-(cache.capacity - 1) :] if cache.capacity > 1 else []
    hit = found is not None
    entries = {**dict(kept), key: maps}
    return maps, MapCache(entries, cache.capacity, cache.hits + hit, cache.misses + (not hit))
