"""Accuracy on real data and a trained network, where they are present (`FQUANT_DATA`)."""

import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fquant as fq

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


def equalizer(amax, weight):
    """The factor per input channel that shares the range between activation and weight."""
    weight_amax = weight.abs().amax(dim=(0, 2, 3)).view(1, -1, 1, 1).clamp(min=1e-5)
    return amax.clamp(min=1e-5) ** 0.75 / weight_amax**0.25


@needs_data
def test_depthwise_network_in_8_bits_is_as_close_as_the_best_static_peer(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DATA), *sys.path])
    import models

    model = models.FashionDW()
    model.load_state_dict(read_safetensors(DATA / "models" / "fashion_dw.safetensors"))
    model.eval()
    images = np.load(DATA / "fashion" / "fashion_open.npz")
    calibration, test = (
        torch.from_numpy(images[name][:count]).float()[:, None] / 255
        for name, count in (("train_x", 512), ("test_x", 2000))
    )
    params = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    params = {name: p.detach() for name, p in params.items()}
    weight = fq.Quantizer(fq.QuantSpec(narrow_range=True), "channel")
    positive = fq.QuantSpec(unsigned=True)  # pixels, and what follows a ReLU6
    rules = [
        # A depthwise convolution's output channel reads one input channel: scales per channel fold.
        fq.OpRule(r".*\.dw", weight=weight, inputs=fq.Quantizer(positive, "channel")),
        fq.OpRule(r"stem|.*\.pl", weight=weight, inputs=positive),
        *fq.w8a8(),
    ]
    batches = calibration.split(128)
    per_channel = [fq.OpRule(r".*\.pw", inputs=fq.Quantizer(per="channel"))]
    watched = fq.make_plan(model, per_channel, (calibration[:2],))
    stats = fq.calibrate_model(model, watched, params, batches, progress=False)
    amax = fq.observed_amax(stats, watched.observers)
    factors = {
        id(params[f"{site.path}.weight"]): equalizer(
            amax[f"{site.name}.input"], params[f"{site.path}.weight"]
        )
        for site in watched.sites
        if site.operands[0].quantizer is not None
    }

    def equalized(block, x):
        """The block with its first convolution equalized: the same function, and one that deploys.

        The batch norm before it takes the factors into its scale when it is rounded, the weight into
        its values.
        """
        weight = block.pw.weight
        factor = factors.get(id(weight), 1.0)  # a tensor without data, while planning, has none
        h = block.a0(block.bn0(F.conv2d(x / factor, weight * factor)))
        h = block.bn2(block.pl(block.a1(block.bn1(block.dw(h)))))
        return h + x if block.skip else h

    ops = fq.replace_forward(fq.DEFAULT_OPS, models.IR, equalized)
    plan = fq.make_plan(model, rules, (calibration[:2],), ops=ops)
    assert not plan.unquantized
    stats = fq.calibrate_model(model, plan, params, batches, ops=ops, progress=False)
    forward = fq.fake_quant(model, plan, ops=ops)
    with torch.no_grad():
        exact, y = model(test), forward(params, fq.finalize(plan, stats), test)
    sqnr = 10 * torch.log10(exact.square().sum() / (y - exact).square().sum()).item()
    agreement = (y.argmax(1) == exact.argmax(1)).float().mean().item() * 100
    print(f"fashion_dw w8a8: {sqnr:.2f} dB, {agreement:.2f} % agreement")
    assert sqnr >= 37.7  # torchao 0.18 static, the best of the peers
    assert agreement >= 99.65
