"""Scan-like scenes: a spinning LiDAR driven along a street of walls, poles and trees, ray by ray.

Uniformly random voxels have 1.04 active taps of 27 and make any sparse convolution look good;
outdoor scans have 3 to 17. These have 6 at 50,000 voxels and 7 at 200,000.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_VOXEL = 0.1  # metres
_RANGE = 60.0
_SENSOR_HEIGHT = 1.9
_STEP = 2.0  # metres driven between two turns of the sensor


class Scene(NamedTuple):
    """Voxels of one scene."""

    coords: Tensor  # (N, 4) int32: batch, x, y, z; unique, in the order they were seen
    spatial_shape: tuple[int, int, int]


class _Street(NamedTuple):
    low: np.ndarray  # (boxes, 3) corners
    high: np.ndarray
    leafy: np.ndarray  # (boxes,) whether rays end inside the box, not on its face


def _street(random: np.random.Generator, length: float) -> _Street:
    count = int(length / 2)
    x = random.uniform(-_RANGE, length + _RANGE, count)
    side = random.choice([-1.0, 1.0], count)
    kind = random.choice(3, count, p=[0.4, 0.35, 0.25])  # wall or car, pole, tree
    size = np.array([[6.0, 3.0, 4.0], [0.4, 0.4, 6.0], [5.0, 5.0, 6.0]])[kind]
    size = size * random.uniform(0.4, 1.6, (count, 3))
    y = side * (random.uniform(5.0, 25.0, count))
    base = np.where(kind == 2, 1.5, 0.0)
    low = np.stack([x - size[:, 0] / 2, y - size[:, 1] / 2, base], axis=1)
    return _Street(low, low + size, kind == 2)


def _turn(random: np.random.Generator, street: _Street, x: float) -> np.ndarray:
    """Returns the points of one turn of the sensor at `(x, 0)`, float64 of shape `(points, 3)`."""
    up, around = np.meshgrid(
        np.deg2rad(np.linspace(-24.0, 4.0, 64)),
        2 * np.pi * (np.arange(1500) + random.random()) / 1500,
        indexing="ij",
    )
    ray = np.stack([np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up)], -1)
    ray = ray.reshape(-1, 3)
    start = np.array([x, 0.0, _SENSOR_HEIGHT])
    # A zero component would make 0 / 0 on a face through the sensor.
    inverse = 1.0 / np.where(np.abs(ray) < 1e-9, 1e-9, ray)
    distance = np.where(ray[:, 2] < 0, -_SENSOR_HEIGHT * inverse[:, 2], np.inf)
    near = np.abs((street.low[:, 0] + street.high[:, 0]) / 2 - x) < _RANGE
    for low, high, leafy in zip(
        street.low[near], street.high[near], street.leafy[near], strict=True
    ):
        a, b = (low - start) * inverse, (high - start) * inverse
        enter = np.minimum(a, b).max(axis=1)
        leave = np.maximum(a, b).min(axis=1)
        if leafy:
            enter = enter + random.exponential(1.5, len(enter))
        hit = (enter < leave) & (enter > 0)
        distance = np.where(hit & (enter < distance), enter, distance)
    seen = distance < _RANGE
    distance = distance[seen] + random.normal(0.0, 0.02, int(seen.sum()))
    points = start + ray[seen] * distance[:, None]
    points[:, 2] += 0.3 * np.sin(points[:, 0] / 9.0) + 0.2 * np.sin(points[:, 1] / 7.0)
    return points


def scan_scene(num_voxels: int, seed: int = 0) -> Scene:
    """Returns a scene of exactly `num_voxels` voxels of 0.1 m, as many turns as it takes."""
    random = np.random.default_rng(seed)
    length = 20.0 + num_voxels / 2000  # a turn adds 5,000 to 40,000 voxels
    street = _street(random, length)
    keys = np.empty(0, dtype=np.int64)  # three signed coordinates of 20 bits
    x = 0.0
    while len(keys) < num_voxels:
        found = np.floor(_turn(random, street, x) / _VOXEL).astype(np.int64) + (1 << 19)
        both = np.concatenate([keys, found[:, 0] << 40 | found[:, 1] << 20 | found[:, 2]])
        _, first = np.unique(both, return_index=True)
        keys = both[np.sort(first)]
        x += _STEP
    keys = keys[:num_voxels]
    voxels = np.stack([keys >> 40, keys >> 20 & 0xFFFFF, keys & 0xFFFFF], axis=1)
    voxels = voxels - voxels.min(axis=0)
    shape = voxels.max(axis=0) + 1
    coords = np.concatenate([np.zeros((num_voxels, 1), dtype=np.int64), voxels], axis=1)
    return Scene(
        torch.from_numpy(coords.astype(np.int32)), (int(shape[0]), int(shape[1]), int(shape[2]))
    )
