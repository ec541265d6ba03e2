"""Trained sparse networks on real data: float as recorded, int8 by post-training quantization.

The networks and data are no part of this project. They are read from the folder named by FQUANT_DATA,
or from `../shared/data` beside the checkout; without them these tests are skipped and say so.
"""

import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call

import fquant as fq
from fquant.serialization import card_maps, load_network_card, run_card, save_network_card
from fquant.sparse import SparseTensor
from fquant.sparse_network import (
    Layer,
    SparseNetwork,
    card_of_network,
    convolutions,
    fold_network,
    int8_network,
    int8_rules,
    make_maps,
    tie_scales,
    to_int8,
)
from fquant.testing.scenes import load_arrays

DATA = Path(os.environ.get("FQUANT_DATA", Path(__file__).parents[3] / "shared" / "data"))
pytestmark = pytest.mark.skipif(
    not (DATA / "models").is_dir(), reason=f"no trained networks in {DATA}"
)


def load(name):
    """(layers, parameters with batch norm folded) of a network."""
    raw = (DATA / "models" / f"{name}.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    steps = json.loads(header.pop("__metadata__")["spec"])

    def tensor(key):
        entry = header[key]
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        array = np.frombuffer(raw[start:end], dtype=np.float32).reshape(entry["shape"])
        return torch.from_numpy(array.copy())

    layers, state, saved, undone = [], {}, {}, {}
    last, inputs = "input", ()
    for step in steps:
        op, name = step["op"], step["name"]
        if op == "save":
            saved[step["key"]] = last
        elif op == "cat":
            inputs = (last, saved[step["key"]])
        elif op == "gap":
            layers.append(Layer(name, "global_avg_pool"))
        elif op == "linear":
            layers.append(Layer(name, "linear", (step["cin"], step["cout"])))
            state |= {f"{name}.{leaf}": tensor(f"{name}.{leaf}") for leaf in ("weight", "bias")}
        elif op not in ("bn", "relu"):  # which follow every convolution
            kind, key = ("inverse" if op == "inv" else op), step.get("key")
            sizes = (step["k"], step.get("s", 1), step.get("p", 0))
            channels, undoes = (step["cin"], step["cout"]), undone[key] if op == "inv" else ""
            layers.append(Layer(name, kind, channels, *sizes, inputs=inputs, undoes=undoes))
            if op == "conv":
                undone[key] = name
            state[f"{name}.weight"] = tensor(f"{name}_weight").movedim(-1, 0).contiguous()
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                state[f"{name}.norm.{leaf}"] = tensor(f"{name}_bn.{leaf}")
            last, inputs = name, ()
    return layers, fold_network(layers, state)


def network(layers):
    """The list as a module, without batch norm."""
    axes = 2 if any(layer.op == "global_avg_pool" for layer in layers) else 3
    return SparseNetwork(layers, axes, batch_norm=False)


def logits_of(output):
    return output.features if isinstance(output, SparseTensor) else output


def in_float(layers, params, x):
    with torch.no_grad():
        return logits_of(functional_call(network(layers), params, (x, make_maps(layers, x))))


def calibrated(layers, params, x):
    """The network in int8, all convolutions, with ranges of one batch."""
    model, int8, maps = network(layers), convolutions(layers), make_maps(layers, x)
    plan = fq.make_plan(model, int8_rules(layers, int8), (x, maps))
    stats = fq.calibrate_model(model, plan, params, [(x, maps)], progress=False)
    return to_int8(layers, int8, params, tie_scales(layers, int8, fq.finalize(plan, stats)))


def in_int8(name, layers, deployed, x, path):
    """Logits, which a card gives too after a file of a quarter of the float file's size."""
    y = logits_of(int8_network(layers, convolutions(layers))(deployed, x, make_maps(layers, x)))
    save_network_card(path, card_of_network(layers, deployed))
    card = load_network_card(path)
    assert torch.equal(logits_of(run_card(card, x, card_maps(card, x))), y)
    share = path.stat().st_size / (DATA / "models" / f"{name}.safetensors").stat().st_size
    print(f"network card: {share:.4f} of the float file's size")
    assert share <= 0.275  # a quarter, and names
    return y


def mnist(images):
    return SparseTensor.from_dense(torch.from_numpy(images).float().unsqueeze(1) / 255)


def test_digits_in_float_and_in_int8(tmp_path):
    layers, params = load("sp2d_mnist_a")
    data = load_arrays(DATA / "mnist" / "mnist_open.npz")
    expected = load_arrays(DATA / "expected" / "sp2d_mnist_a_logits.npz")["logits"]
    x, labels = mnist(data["test_x"]), torch.from_numpy(data["test_y"]).long()
    exact = in_float(layers, params, x)
    # Float sums of up to 576 products in another order, through six layers.
    assert np.allclose(exact[:500].numpy(), expected, atol=2e-3)
    assert (exact.argmax(1) == labels).float().mean() == pytest.approx(0.98, abs=1e-6)
    deployed = calibrated(layers, params, mnist(data["train_x"][:256]))
    integers = in_int8("sp2d_mnist_a", layers, deployed, x, tmp_path / "card")
    accuracy = (integers.argmax(1) == labels).float().mean().item()
    agreement = (integers.argmax(1) == exact.argmax(1)).float().mean().item()
    noise = (integers - exact).double().square().sum()
    decibels = 10 * math.log10(exact.double().square().sum() / noise)
    print(f"int8: accuracy {accuracy:.4f}, agreement {agreement:.4f}, logits {decibels:.2f} dB")
    assert accuracy >= 0.979
    assert agreement >= 0.998
    assert decibels >= 34


def voxels(train):
    cloud = load_arrays(DATA / "lidar" / "pdal_autzen.npz")
    xyz = cloud["xyz"]
    tiles = (np.floor(xyz[:, 0] / 140) + np.floor(xyz[:, 1] / 140)).astype(int) % 3 == 2
    chosen = ~tiles if train else tiles
    returns = cloud["returns"]
    features = np.concatenate(
        [
            np.ones((len(xyz), 1)),
            np.log1p(cloud["intensity"].astype(np.float32))[:, None] / 6,
            cloud["rgb"] / 255.0,
            (returns[:, 0] / returns[:, 1].clip(1))[:, None],
        ],
        axis=1,
    ).astype(np.float32)[chosen]
    points = torch.from_numpy(xyz[chosen] - xyz[chosen].min(axis=0))
    size = [5.0, 5.0, 2.0]
    cells = (points.double() / torch.tensor(size)).floor().amax(0) + 1
    upper = (cells * torch.tensor(size)).tolist()
    voxelized = fq.sparse.from_points(points, torch.from_numpy(features), size, [0.0] * 3, upper)
    return voxelized, torch.from_numpy(cloud["label_hag"][chosen]).long()


def mean_iou(predicted, labels):
    scores = []
    for c in range(4):
        both = ((predicted == c) & (labels == c)).sum()
        scores.append(both / ((predicted == c) | (labels == c)).sum())
    return 100 * torch.stack(scores).mean().item()


def test_airborne_lidar_in_float_and_in_int8(tmp_path):
    layers, params = load("sp3d_autzen_unet")
    (x, cell), labels = voxels(train=False)
    recorded = load_arrays(DATA / "expected" / "sp3d_autzen_unet_logits.npz")
    assert np.array_equal(x.coords.numpy(), recorded["coords"])
    exact = in_float(layers, params, x)
    assert np.allclose(exact.numpy(), recorded["logits"], atol=5e-3)
    float_iou = mean_iou(exact.argmax(1)[cell], labels)
    assert float_iou == pytest.approx(65.50, abs=0.02)
    (train, _), _ = voxels(train=True)
    deployed = calibrated(layers, params, train)
    integers = in_int8("sp3d_autzen_unet", layers, deployed, x, tmp_path / "card")
    int8_iou = mean_iou(integers.argmax(1)[cell], labels)
    print(f"mean IoU: float {float_iou:.2f}, int8 {int8_iou:.2f}")
    assert int8_iou >= float_iou - 0.5
