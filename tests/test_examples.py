"""The examples of dense networks run, and show what they say."""

import importlib
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("sklearn")


def example(name):
    return importlib.import_module(f"fquant.examples.{name}")


def test_cnn():
    percent = example("cnn").main(steps=80)
    assert percent["float"] > 75
    assert percent["calibrated"] < percent["float"] - 1  # 3 bits cost something
    assert percent["fine-tuned"] > percent["calibrated"] + 5


def test_transformer():
    results = example("transformer").main(steps=80)
    assert results["float"] > 60
    assert results["calibrated"] > results["float"] - 2
    assert results["quantizers"] == 2 * (2 + 3 + 2 + 2 + 2)  # attention: two products of three


def test_lstm():
    percent = example("lstm").main(steps=150)
    assert percent["float"] > 50  # both kinds of digits, in few steps
    assert min(percent["static"], percent["dynamic"]) > percent["float"] - 3


def test_ensemble_of_settings():
    percent = example("ensemble").main(steps=80)
    assert len(set(percent.values())) > 2  # the settings differ
    assert min(percent.values()) > 65


def test_per_sample_gradients():
    norms = example("per_sample_gradients").main(size=16)
    assert 0 < norms["smallest"] < norms["largest"]
    assert norms["clipped mean"] <= 1.0
    assert norms["mean against batch"] < 1e-6


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes print that are started as torchrun starts them."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            # Of one that is aborted, the stack is told.
            [sys.executable, "-X", "faulthandler", str(Path(__file__).parent / "two_processes.py")],
            env={**os.environ, **shared, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path_factory.mktemp("two"),
        )
        for rank in range(2)
    ]
    try:
        with ThreadPoolExecutor(2) as pool:  # reads what both say, so that none waits to say more
            said = list(pool.map(lambda process: process.communicate(timeout=240), ranks))
    finally:
        for process in ranks:
            process.kill()
    for rank, (process, (_, errors)) in enumerate(zip(ranks, said, strict=True)):
        end = errors[-20_000:]
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{end}"
    return json.loads(said[0][0].splitlines()[-1])


def test_two_processes_are_one(two_processes):
    two, one = dict(two_processes["example"]), example("distributed").main()
    losses, one_losses = two.pop("losses"), one.pop("losses")
    assert two == one  # every scale, to the last bit
    assert len(losses) == 20
    # Gradients of two halves are summed in another order.
    assert losses == pytest.approx(one_losses, rel=1e-4)
    assert losses[-1] < 0.95 * losses[0]


def test_a_fake_quantized_module_is_one_unit_of_fsdp2(two_processes):
    assert two_processes["fsdp2"] < 1e-6
