"""Voxel scenes for benches and examples: seeded synthetic LiDAR scans, and real ones where there are.

Uniformly random voxels mislead (1.04 active taps of 27; real scans have 3 to 17), and so do flat
grounds with boxes (their coarse levels come out ten times too small). Here a sensor of `beams` x
`columns` cells sees, per cell, the nearest of: a rolling ground, walls, and plants. Plants are
clouds of points, and they are what gives coarse levels their voxels.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Scene:
    """Voxels of one point cloud.

    `coords` is `(N, 4)` int32 rows (batch, z, y, x), unique, in the order the points were seen.
    """

    name: str
    coords: Tensor
    spatial_shape: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Sensor:
    """A spinning LiDAR and the voxel grid its points are put on; metres and degrees."""

    beams: int
    columns: int
    elevation: tuple[float, float]
    sweeps: int
    voxel: tuple[float, float, float]  # z, y, x
    reach: float
    plants: int
    walls: int
    seed: int


# Chosen so that voxels and active taps of the first level are near those of real scans
# (SemanticKITTI 94k and 3.0, nuScenes 105k and 6.1, Waymo 115k and 6.8): here 86k and 3.8, 110k and
# 5.9, 89k and 4.8. The next levels come out denser than the real ones.
SENSORS = {
    "kitti": Sensor(64, 2000, (-24.0, 2.0), 1, (0.05, 0.05, 0.05), 70.0, 220, 25, 1),
    "nuscenes": Sensor(32, 1090, (-30.0, 10.0), 6, (0.2, 0.075, 0.075), 54.0, 90, 20, 2),
    "waymo": Sensor(64, 2650, (-17.6, 2.4), 1, (0.15, 0.1, 0.1), 75.0, 200, 25, 3),
}


def _ground_height(x: np.ndarray, y: np.ndarray, random: np.random.Generator) -> np.ndarray:
    height = np.zeros_like(x)
    for _ in range(5):
        kx, ky = random.uniform(-0.15, 0.15, 2)
        height += 0.25 * np.sin(kx * x + ky * y + random.uniform(0, 2 * np.pi))
    return height


CLASSES = ("ground", "vegetation", "building")


def _objects(sensor: Sensor, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points of walls (flat) and plants (scattered), denser near the sensor, and their classes."""
    clouds, classes = [], []
    distance = 8 + random.exponential(30, sensor.plants + sensor.walls)
    angle = random.uniform(0, 2 * np.pi, sensor.plants + sensor.walls)
    center = np.stack([distance * np.cos(angle), distance * np.sin(angle)], axis=1)
    for i, (middle, away) in enumerate(zip(center, distance, strict=True)):
        count = int(np.clip(8e4 / away, 500, 6000))
        if i < sensor.plants:
            radius, tall = random.uniform(1.0, 4.0), random.uniform(0.5, 3.0)
            spread = random.normal(0, 0.45, (count, 3)) * (radius, radius, tall)
            points = spread + np.array([*middle, tall - 1.8])
        else:
            along = random.uniform(0, np.pi)
            side = random.uniform(-1, 1, count) * random.uniform(2, 12)
            points = np.stack([side * np.cos(along), side * np.sin(along), np.zeros(count)], axis=1)
            points += (*middle, -1.8)
            points[:, 2] += random.uniform(0, random.uniform(2, 8), count)
        clouds.append(points)
        classes.append(np.full(count, 1 if i < sensor.plants else 2))
    points = np.concatenate(clouds)
    away_from_sensor = np.linalg.norm(points, axis=1) > 4.0
    return points[away_from_sensor], np.concatenate(classes)[away_from_sensor]


def _sweep(
    sensor: Sensor, objects: np.ndarray, classes: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest point per cell of the sensor, at the range a sweep measures it, and its class."""
    low, high = np.deg2rad(sensor.elevation)
    beam = np.linspace(low, high, sensor.beams)[:, None]
    column = (np.arange(sensor.columns) + random.uniform())[None] * 2 * np.pi / sensor.columns
    flat = np.where(beam < -0.01, 1.8 / np.tan(-np.minimum(beam, -0.01)), np.inf)
    flat = np.minimum(np.broadcast_to(flat, (sensor.beams, sensor.columns)), 2 * sensor.reach)
    drop = 1.8 - _ground_height(flat * np.cos(column), flat * np.sin(column), random)
    nearest = np.where(beam < -0.01, drop / np.sin(-np.minimum(beam, -0.01)), np.inf)

    distance = np.linalg.norm(objects, axis=1)
    up = np.arcsin(objects[:, 2] / distance)
    row = np.rint((up - low) / (high - low) * (sensor.beams - 1)).astype(np.int64)
    around = np.arctan2(objects[:, 1], objects[:, 0]) % (2 * np.pi)
    cell = (around * sensor.columns / (2 * np.pi)).astype(np.int64) % sensor.columns
    seen = (row >= 0) & (row < sensor.beams)
    np.minimum.at(nearest, (row[seen], cell[seen]), distance[seen])
    kind = np.zeros(nearest.shape, np.int64)
    seen &= distance == nearest[row.clip(0, sensor.beams - 1), cell]
    kind[row[seen], cell[seen]] = classes[seen]

    measured = nearest + random.normal(0, 0.02, nearest.shape)
    keep = (nearest < sensor.reach) & (random.uniform(size=nearest.shape) > 0.08)
    rays = np.stack(
        [
            np.cos(beam) * np.cos(column),
            np.cos(beam) * np.sin(column),
            np.sin(beam) * np.ones_like(column),
        ],
        axis=-1,
    )
    return (rays * measured[..., None])[keep], kind[keep]


def labelled_scan(sensor: Sensor) -> tuple[np.ndarray, np.ndarray]:
    """Returns one sweep: points `(P, 3)` as (x, y, z) in metres from the sensor, and classes `(P,)`.

    Classes count in `CLASSES`. The same sensor, seed included, sees the same scene.
    """
    random = np.random.default_rng(sensor.seed)
    return _sweep(sensor, *_objects(sensor, random), random)


def voxelize(points: np.ndarray, voxel: tuple[float, ...]) -> tuple[Tensor, tuple[int, int, int]]:
    """Returns unique voxels in order of first point, as (batch, z, y, x), and the grid."""
    cells = np.floor(points[:, ::-1] / np.asarray(voxel)).astype(np.int64)
    cells -= cells.min(axis=0)
    z, y, x = (int(size) for size in cells.max(axis=0) + 1)
    shape = (z, y, x)
    _, first = np.unique(np.ravel_multi_index(tuple(cells.T), shape), return_index=True)
    cells = cells[np.sort(first)]
    coords = np.concatenate([np.zeros((len(cells), 1), np.int64), cells], axis=1)
    return torch.from_numpy(coords.astype(np.int32)), shape


def synthetic(name: str, sweeps: int | None = None) -> Scene:
    """Returns one scan of a sensor of `SENSORS`; more `sweeps` make a denser cloud."""
    sensor = SENSORS[name]
    random = np.random.default_rng(sensor.seed)
    objects, classes = _objects(sensor, random)
    ground = int(random.integers(1 << 31))
    clouds = []
    for step in range(sensor.sweeps if sweeps is None else sweeps):
        moved = objects - (0.4 * step, 0.0, 0.0)
        points, _ = _sweep(sensor, moved, classes, np.random.default_rng((ground, step)))
        clouds.append(points + np.array([0.4 * step, 0.0, 0.0]))
    points = np.concatenate(clouds)
    coords, shape = voxelize(points, sensor.voxel)
    return Scene(name if sweeps is None else f"{name}-{sweeps}", coords, shape)


def of_size(num_voxels: int) -> Scene:
    """Returns the first `num_voxels` voxels of as many nuScenes-like sweeps as that takes."""
    sweeps = 1 + num_voxels // 14_000
    while True:
        cloud = synthetic("nuscenes", sweeps)
        if len(cloud.coords) >= num_voxels:
            coords = cloud.coords[:num_voxels].contiguous()
            return Scene(f"{cloud.name}-{num_voxels}", coords, cloud.spatial_shape)
        sweeps *= 2


def data_folder(name: str = "lidar") -> Path | None:
    """Returns a folder of real data in `$FQUANT_DATA`, else in `../shared/data`, if it is there."""
    root = os.environ.get("FQUANT_DATA")
    folder = Path(root) if root else Path(__file__).parents[3] / "shared" / "data"
    return folder / name if (folder / name).is_dir() else None


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file, which is closed."""
    with np.load(path) as file:
        return dict(file)


REAL = {
    "ouster_os1_128_frame0": (0.1, 0.1, 0.1),
    "ouster_os2_128": (0.1, 0.1, 0.1),
    "pdal_autzen": (2.0, 5.0, 5.0),  # feet
    "libpointmatcher_car_cloud400": (0.1, 0.1, 0.1),
}


def real() -> list[Scene]:
    """Returns the real scans there are."""
    folder = data_folder()
    scenes = []
    for name, voxel in REAL.items():
        if folder is not None and (folder / f"{name}.npz").exists():
            points = load_arrays(folder / f"{name}.npz")["xyz"].astype(np.float64)
            coords, shape = voxelize(points[np.isfinite(points).all(axis=1)], voxel)
            scenes.append(Scene(name, coords, shape))
    return scenes
