"""The sparse examples at their quick size: they run, learn, and int8 agrees with its simulation."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from fquant.examples import (
    distributed_calibration,
    lidar_segmentation,
    sparse_images,
    streaming,
)


def check(rows, least_accuracy, labels):
    by_name = {row.name: row.logits.argmax(1) for row in rows}
    assert (by_name["float"] == labels).double().mean() > least_accuracy
    for name in ("PTQ", "QAT"):
        same = (by_name[f"{name}, int8"] == by_name[f"{name}, fake"]).double().mean()
        assert same > 0.995
        assert (by_name[f"{name}, int8"] == by_name["float"]).double().mean() > 0.9
    sizes = {row.name: row.parameter_bytes for row in rows}
    # 0.43 where the kernels are plain C++, with which small layers are faster in float32.
    assert sizes["QAT, int8"] < 0.45 * sizes["float"]


def test_lidar_segmentation(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "segmentation.png"
    arguments = ["--quick", "--no-progress", "--picture", str(picture)]
    result = lidar_segmentation.main(arguments)
    check(result.rows, 0.6, result.labels)
    assert picture.stat().st_size > 1000
    assert "mIoU %" in capsys.readouterr().out
    kinds = {choice.layer: choice.int8 for choice in result.choices}
    assert not kinds["stem"]
    assert not kinds["head"]
    assert kinds["coarse"]


def test_sparse_images():
    pytest.importorskip("sklearn")
    result = sparse_images.main(["--quick", "--no-progress"])
    check(result.rows, 0.6, result.labels)


def test_streaming(capsys):
    result = streaming.main(["--quick", "--no-progress"])
    assert (result.cache.hits, result.cache.misses) == (2, 8)
    assert len(result.seconds["whole scan"]) == len(result.voxels) == 10
    text = capsys.readouterr().out
    assert "p99" in text
    assert "maps of 2" in text


def test_intersection_over_union():
    predicted, labels = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 2])
    iou = lidar_segmentation.intersection_over_union(predicted, labels, 3)
    assert torch.allclose(iou, torch.tensor([50.0, 100 / 3, 0.0], dtype=torch.float64))


def test_calibration_on_two_processes_is_that_of_one(tmp_path):
    g = torch.Generator().manual_seed(0)
    for i in range(3):
        points = torch.randn(400 * (i + 1), 3, generator=g) * torch.tensor([3.0, 3.0, 0.5])
        np.savez(tmp_path / f"scan{i}.npz", xyz=points.numpy())
    arguments = [str(tmp_path), "--reach", "6"]
    alone = distributed_calibration.main(arguments)
    scales = tmp_path / "scales.json"
    command = [sys.executable, "-m", "fquant.examples.distributed_calibration", *arguments]
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [  # what torchrun does
        subprocess.Popen(
            [*command, "--scales", str(scales)],
            env={**os.environ, **shared, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    assert json.loads(scales.read_text()) == alone
    assert len(alone) > 10
