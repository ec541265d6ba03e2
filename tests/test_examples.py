"""The examples of docs/examples run, and show what they say."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.delenv("FQUANT_DATA", raising=False)  # the digits of scikit-learn
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_cnn(example):
    percent = example("cnn").main(steps=80)
    assert percent["float"] > 90
    assert percent["calibrated"] < percent["float"] - 1  # 3 bits cost something
    assert percent["fine-tuned"] > percent["calibrated"] + 1


def test_transformer(example):
    results = example("transformer").main(steps=80)
    assert results["float"] > 75
    assert results["calibrated"] > results["float"] - 2
    assert results["quantizers"] == 2 * (2 + 3 + 2 + 2 + 2)  # attention: two products of three


def test_lstm(example):
    percent = example("lstm").main(steps=100)
    assert percent["float"] > 75
    assert min(percent["static"], percent["dynamic"]) > percent["float"] - 2


def test_ensemble_of_settings(example):
    percent = example("ensemble").main(steps=80)
    assert len(set(percent.values())) > 2  # the settings differ
    assert min(percent.values()) > 70


def test_per_sample_gradients(example):
    norms = example("per_sample_gradients").main(size=16)
    assert 0 < norms["smallest"] < norms["largest"]
    assert norms["clipped mean"] <= 1.0
    assert norms["mean against batch"] < 1e-6


def test_two_processes_are_one(example, tmp_path):
    script = str(EXAMPLES / "distributed.py")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.run([*run, script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert two.returncode == 0, two.stderr[-2000:]
    two_ranks, one = json.loads(two.stdout), example("distributed").main()
    losses, one_losses = two_ranks.pop("losses"), one.pop("losses")
    assert two_ranks == one  # every scale, to the last bit
    assert len(losses) == 20
    # Gradients of two halves are summed in another order.
    assert losses == pytest.approx(one_losses, rel=1e-4)
    assert losses[-1] < 0.8 * losses[0]
