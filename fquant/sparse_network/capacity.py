"""A network's input and maps with fixed numbers of rows, level by level."""

from collections.abc import Mapping, Sequence

from fquant.sparse import SparseTensor, pad_map, pad_to_capacity
from fquant.sparse_network.layer import NETWORK_INPUT, Layer
from fquant.sparse_network.maps import Maps, geometries


def level_counts(layers: Sequence[Layer], x: SparseTensor, maps: Maps) -> dict[str, int]:
    """Returns the number of cells of every level: "input", and the key of each map that makes new cells.

    The largest of several scenes, with some room, is what to give `pad_network`.

    Example:
        >>> layers = [Layer("down", "conv", (1, 2), 2, 2)]
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.ones(1, 1, 4))
        >>> level_counts(layers, x, fquant.sparse_network.make_maps(layers, x))
        {'input': 4, 'input/conv2s2p0': 2}
    """
    counts = {NETWORK_INPUT: x.coords.shape[0]}
    for geometry in geometries(layers).values():
        counts[geometry.writes] = maps[geometry.key].out_coords.shape[0]
    return counts


def pad_network(
    layers: Sequence[Layer], x: SparseTensor, maps: Maps, capacity: Mapping[str, int]
) -> tuple[SparseTensor, Maps]:
    """Returns (x, maps) with as many rows at each level as `capacity` says (`fquant.sparse.capacity`).

    Scenes that differ in their number of cells then have one shape, and a network compiled or
    captured for it runs them all. In the rows of cells its results are those without padding, of int8
    layers bit for bit.

    Raises:
        ValueError: a level is missing in capacity, or has more cells than its capacity; the message
            names the level. Nothing is ever cut off.
    """
    counts = level_counts(layers, x, maps)
    missing = sorted(counts.keys() - capacity.keys())
    if missing:
        raise ValueError(f"pad_network: capacity must have every level, lacks {missing}.")
    over = {level: (n, capacity[level]) for level, n in counts.items() if n > capacity[level]}
    if over:
        found = ", ".join(f"{n} cells at {level!r} for {room}" for level, (n, room) in over.items())
        raise ValueError(f"pad_network: capacity must hold every level, got {found}.")
    padded = {
        g.key: pad_map(maps[g.key], capacity[g.reads], capacity[g.writes])
        for g in geometries(layers).values()
    }
    return pad_to_capacity(x, capacity[NETWORK_INPUT]), padded
