"""Choosing launch parameters, remembering measured ones, and saying why Triton cannot run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fquant_kernels import triton_support
from fquant_kernels.conv_int8 import configs, tuning_cache

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("tile_rows", [16, 64, 128])
@pytest.mark.parametrize("cout", [1, 16, 33, 96, 128, 1000])
@pytest.mark.parametrize("cin", [16, 48, 256, 1024])
def test_every_configuration_is_legal(
    capability: tuple[int, int], tile_rows: int, cout: int, cin: int
) -> None:
    found = configs.candidates(cin, cout, tile_rows, capability)
    assert found[0] == configs.default_config(cin, cout, tile_rows, capability)
    assert len(set(found)) == len(found)
    for config in found:
        assert config.block_n in (16, 32, 64, 128)
        assert config.block_k in (32, 64, 128)  # an int8 product takes 32 channels at least
        assert config.num_warps in (4, 8)


def test_measured_choice_is_stored_and_found(tmp_path: Path) -> None:
    name = "op_gpu_cin16.json"
    assert tuning_cache.look_up(tmp_path, name) is None
    tuning_cache.store(tmp_path / "new", name, (64, 64, 4, 5), 0.1)
    tuning_cache.store(tmp_path / "new", name, (128, 64, 8, 5), 0.05)
    assert tuning_cache.look_up(tmp_path / "new", name) == (128, 64, 8, 5)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"config": [1, 2, 3]}', '{"config": [1, 2, 3, -4]}', '{"config": 5}']
)
def test_a_damaged_cache_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json must hold four positive integers"):
        tuning_cache.look_up(tmp_path, "a.json")


def test_cache_is_off_without_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning_cache.FOLDER_VARIABLE, raising=False)
    assert tuning_cache.folder_from_environment() is None


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        ("3.6.0", (9, 0), None),
        ("3.9.0", (12, 0), None),
        ("3.9.0", (7, 5), "compute capability 7.5, 8.0 is needed"),
        ("3.3.1", (9, 0), "triton must be 3.4 or newer"),
        ("3.6.0", (10, 0), "triton must be 3.9 or newer"),
    ],
)
def test_reason_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, version: str, capability: tuple[int, int], reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(triton_support.importlib.metadata, "version", lambda _: version)
    found = triton_support.why_unavailable()
    assert found is None if reason is None else reason in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_a_reason() -> None:
    assert triton_support.why_unavailable() == "torch sees no CUDA device"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_bench_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benches import gpu

    with pytest.raises(SystemExit, match=r"torch sees no CUDA device\. --dry-run does without"):
        gpu.main([])


def test_gpu_bench_writes_its_json_in_a_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    tiny = ["--voxels", "40", "--channels", "16", "--tile-rows", "64", "--cases", "2"]
    path = [str(ROOT), str(ROOT / "kernels"), *sys.path]
    done = subprocess.run(
        [sys.executable, "-m", "benches.gpu", "--dry-run", "--output", str(tmp_path), *tiny],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert result["dry_run"]
    assert result["checks"] == {"conv_int8": 2, "kernel_map": 2, "conv_half": 2}
    assert result["environment"]["torch"] == torch.__version__
    assert not any("ms" in row for row in result["rows"])
    assert {"int8 from the table", "int8 tiles of 64 rows mask-sorted"} <= {
        row.get("way") for row in result["rows"]
    }
