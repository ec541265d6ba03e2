"""Accuracy on real data and a trained network, where they are present (`FQUANT_DATA`)."""

import importlib.util
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fquant as fq
from fquant.testing.scenes import load_arrays

DATA = Path(os.environ.get("FQUANT_DATA") or Path(__file__).parents[2] / "shared" / "data")
needs_data = pytest.mark.skipif(
    not (DATA / "models" / "fashion_dw.safetensors").exists(),
    reason=f"no open models in {DATA}; set FQUANT_DATA",
)
DTYPES = {"F32": np.float32, "I64": np.int64}


def read_safetensors(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    tensors = {}
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            values = np.frombuffer(content[start:end], DTYPES[entry["dtype"]])
            tensors[name] = torch.from_numpy(values.reshape(entry["shape"]).copy())
    return tensors


def open_models(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DATA), *sys.path])
    import models

    return models


def sqnr(exact, y):
    return 10 * torch.log10(exact.square().sum() / (y - exact).square().sum()).item()


@needs_data
def test_depthwise_network_in_8_bits_is_as_close_as_the_best_static_peer(monkeypatch):
    model = open_models(monkeypatch).FashionDW()
    model.load_state_dict(read_safetensors(DATA / "models" / "fashion_dw.safetensors"))
    model.eval()
    images = load_arrays(DATA / "fashion" / "fashion_open.npz")
    train, test = (
        torch.from_numpy(images[name][:count]).float()[:, None] / 255
        for name, count in (("train_x", 768), ("test_x", 2000))
    )
    params = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    params = {name: p.detach() for name, p in params.items()}
    weight = fq.Quantizer(fq.QuantSpec(narrow_range=True), "channel")
    positive = fq.QuantSpec(unsigned=True)  # pixels, and what follows a ReLU6
    rules = [
        # A depthwise convolution's output channel reads one input channel: scales per channel fold.
        fq.OpRule(r".*\.dw", weight=weight, inputs=fq.Quantizer(positive, "channel")),
        fq.OpRule(r"stem|.*\.pl", weight=weight, inputs=positive),
        # Residual streams, whose channels differ: per channel, shared with the weight below.
        fq.OpRule(weight=weight, inputs=fq.Quantizer(per="channel")),
    ]
    plan = fq.make_plan(model, rules, (train[:2],))
    assert not plan.unquantized
    stats = fq.calibrate_model(model, plan, params, train[:512].split(128), progress=False)
    qstate, forward = fq.finalize(plan, stats), fq.fake_quant(model, plan)
    with torch.no_grad():
        held_back = train[512:]  # training images that calibration did not see
        exact = model(held_back)
        scales = {s: fq.equalize(plan, params, qstate, s) for s in (0.5, 0.75, 0.9)}
        found = {s: sqnr(exact, forward(params, q, held_back)) for s, q in scales.items()}
        strength = max(found, key=found.get)
        exact, y = model(test), forward(params, scales[strength], test)
    agreement = (y.argmax(1) == exact.argmax(1)).float().mean().item() * 100
    print(f"fashion_dw w8a8: strength {strength} by {found}")
    print(f"fashion_dw w8a8: {sqnr(exact, y):.2f} dB, {agreement:.2f} % agreement")
    assert sqnr(exact, y) >= 37.7  # torchao 0.18 static, the best of the peers
    assert agreement >= 99.65


def equal_error_rate(embeddings, speakers, utterances):
    """Percent: pairs of windows from different utterances, by cosine."""
    i, j = np.triu_indices(len(embeddings), 1)
    apart = utterances[i] != utterances[j]
    i, j = i[apart], j[apart]
    score = (embeddings @ embeddings.T).numpy()[i, j]
    same = (speakers[i] == speakers[j])[np.argsort(-score, kind="stable")]
    missed = 1 - np.cumsum(same) / same.sum()
    let_in = np.cumsum(~same) / (~same).sum()
    k = np.argmin(abs(missed - let_in))
    return 100 * (missed[k] + let_in[k]) / 2


@needs_data
def test_recurrent_speaker_encoder_in_8_bits_keeps_its_error_rate(monkeypatch):
    package = importlib.util.find_spec("resemblyzer")
    if package is None:
        pytest.skip("no weights: pip install --no-deps Resemblyzer==0.1.4")
    weights = Path(package.submodule_search_locations[0]) / "pretrained.pt"
    model = open_models(monkeypatch).voice_encoder(weights)
    mel, calibration = (load_arrays(DATA / "audio" / f"mel_{n}.npz") for n in ("eval", "calib"))
    windows = torch.from_numpy(mel["mel"]).float().flatten(0, 1)
    per_utterance = mel["mel"].shape[1]
    speakers = np.repeat(mel["speaker"], per_utterance)
    utterances = np.repeat(np.arange(len(mel["mel"])), per_utterance)
    # The power of a mel band is heavy tailed, and most bands of a frame are small beside its largest:
    # 8 neighbours of one frame share a scale, in every layer alike.
    frames = fq.Quantizer(fq.QuantSpec(block=8), "token", dynamic=True)
    rules = [fq.OpRule(weight=fq.QuantSpec(narrow_range=True), inputs=frames)]
    params = {name: p.detach() for name, p in model.named_parameters()}
    batch = torch.from_numpy(calibration["mel"][:1, 0]).float()
    plan = fq.make_plan(model, rules, (batch,))
    assert not plan.unquantized
    assert all(q.spec.num_bits == 8 for q in plan.quantizers.values())
    assert len(plan.quantizers) == 4 * 3 + 2
    qstate = fq.finalize(plan, fq.calibrate_model(model, plan, params, [batch], progress=False))
    with torch.no_grad():
        exact, y = model(windows), fq.fake_quant(model, plan)(params, qstate, windows)
    before, after = (equal_error_rate(e, speakers, utterances) for e in (exact, y))
    print(f"voice LSTM w8a8: EER {after:.3f} % (float {before:.3f} %), {sqnr(exact, y):.2f} dB")
    assert before == pytest.approx(2.80, abs=0.03)  # the known network and protocol
    assert after <= 4.0
