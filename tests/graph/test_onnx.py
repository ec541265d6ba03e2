"""ONNX Runtime gives the integers of the Q/DQ program at every QuantizeLinear: networks."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fquant as fq
from fquant.graph import fold_norms
from fquant.testing.models import EXAMPLES
from fquant.testing.scenes import load_arrays
from tests.graph.onnx_runtime import BATCH, DATA, SUMS, compare, prepared

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("onnx_parsed_once")


def real_inputs(name, count):
    """Patches of photographs or stretches of speech in a model's shape; noise without the data."""
    if not (DATA / "audio").is_dir():
        shape = EXAMPLES[name].inputs()[0].shape[1:]
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    if name == "residual":
        images = load_arrays(DATA / "fashion" / "fashion_open.npz")["test_x"][: 2 * count]
        patches = images[:, 10:15, 10:15].reshape(count, 2, 5, 5)
        return torch.from_numpy(patches.astype(np.float32) / 128 - 1)
    mel = load_arrays(DATA / "audio" / "mel_eval.npz")["mel"].reshape(-1, 160, 40)[:count]
    frames, bands = EXAMPLES[name].inputs()[0].shape[1:]
    chosen = np.log(mel.astype(np.float32) + 1e-6)[:, 20 : 20 + frames, 4 : 4 + bands]
    return torch.from_numpy(chosen.copy())


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("residual", "float"),
        ("encoder", "float"),
        ("recurrent", "integer"),
    ],
)
def test_integers_of_the_zoo(name, weights, tmp_path):
    model = EXAMPLES[name].model().float()
    x = real_inputs(name, 200)
    case = prepared(model, (x,), [SUMS, *fq.w8a8()])
    program = fq.export_qdq(*case, (x[:2],), dynamic_shapes=(BATCH,), weights=weights)
    fq.to_onnx(program, tmp_path / "model.onnx")
    assert str(Path(fq.__file__).parent).encode() not in (tmp_path / "model.onnx").read_bytes()
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not graph.value_info
    absent = {"pads": {0}, "strides": {1}, "dilations": {1}}
    given = [(a.name, set(a.ints)) for node in graph.node for a in node.attribute]
    assert not [a for a in given if a in absent.items()]
    for count in (1, 200):
        share, (y,), expected = compare(program, tmp_path / "model.onnx", (x[:count],))
        print(f"{name}, {count} inputs: {100 * share:.4f} % of integers equal")
        assert share >= 0.999
        assert np.abs(y - expected.numpy()).max() <= 0.1 * expected.abs().max()


@pytest.mark.skipif(not (DATA / "models").is_dir(), reason=f"no trained networks in {DATA}")
def test_integers_of_a_trained_network(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    monkeypatch.setattr(sys, "path", [str(DATA), *sys.path])
    import models

    model = models.FashionDW().eval()
    model.load_state_dict(safetensors.load_file(DATA / "models" / "fashion_dw.safetensors"))
    images = load_arrays(DATA / "fashion" / "fashion_open.npz")
    calibration, x = (
        torch.from_numpy(images[name][:100, None]).float() / 255 for name in ("train_x", "test_x")
    )
    case = prepared(model, (calibration,), fq.w8a8())
    exported = fq.export_qdq(*case, (x[:2],), dynamic_shapes=(BATCH,), weights="integer")
    program = fold_norms(exported)
    fq.to_onnx(program, tmp_path / "model.onnx")
    size = (tmp_path / "model.onnx").stat().st_size
    share = size / (DATA / "models" / "fashion_dw.safetensors").stat().st_size
    print(f"fashion_dw: ONNX without batch norms {size}, {share:.4f} of the float file")
    assert share <= 0.305
    # Behind an integer that float sums in another order flipped, 16 convolutions see the difference.
    share, (y,), expected = compare(program, tmp_path / "model.onnx", (x,), most=8)
    agreement = (y.argmax(1) == expected.numpy().argmax(1)).mean()
    print(f"fashion_dw: {100 * share:.4f} % of integers equal, {100 * agreement:.2f} % of classes")
    assert share >= 0.999
    assert agreement >= 0.99
