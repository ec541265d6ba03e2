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

import fquant as fq
from fquant.serialization import (
    CardLayer,
    CardMap,
    card_maps,
    load_network_card,
    network_card,
    run_card,
    save_network_card,
)
from fquant.sparse import (
    SparseTensor,
    conv_map,
    global_avg_pool,
    sparse_conv,
    sparse_conv_int8,
    subm_map,
    transpose_map,
)

DATA = Path(os.environ.get("FQUANT_DATA", Path(__file__).parents[3] / "shared" / "data"))
pytestmark = pytest.mark.skipif(
    not (DATA / "models").is_dir(), reason=f"no trained networks in {DATA}"
)
WEIGHTS = fq.QuantSpec(narrow_range=True, axis=0)


def load(name):
    """The layers of a network with batch norm folded: [(layer, weight, bias)]."""
    raw = (DATA / "models" / f"{name}.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    steps = json.loads(header.pop("__metadata__")["spec"])

    def tensor(key):
        entry = header[key]
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        array = np.frombuffer(raw[start:end], dtype=np.float32).reshape(entry["shape"])
        return torch.from_numpy(array.copy())

    layers = []
    for i, step in enumerate(steps):
        if step["op"] in ("subm", "conv", "inv"):
            bn = steps[i + 1]["name"]
            gain = tensor(f"{bn}.weight") / (tensor(f"{bn}.running_var") + 1e-5).sqrt()
            weight = tensor(f"{step['name']}_weight").movedim(-1, 0)  # (Cout, *kernel, Cin)
            weight = weight * gain.view(-1, *[1] * (weight.ndim - 1))
            bias = tensor(f"{bn}.bias") - tensor(f"{bn}.running_mean") * gain
            layers.append((step, weight.contiguous(), bias))
        elif step["op"] == "linear":
            layers.append((step, tensor("fc.weight"), tensor("fc.bias")))
        elif step["op"] in ("save", "cat", "gap"):
            layers.append((step, None, None))
    return layers


def make_maps(layers, x):
    """The kernel map of each convolution, shared where the cells are the same."""
    cells, opened, maps, shared = x, {}, [], {}
    for step, _, _ in layers:
        if step["op"] == "subm":
            key = id(cells)
            shared.setdefault(key, subm_map(cells, step["k"]))
            maps.append(shared[key])
        elif step["op"] == "conv":
            below = cells
            cells = conv_map(cells, step["k"], step["s"], step["p"])
            opened[step.get("key")] = (cells, below)
            maps.append(cells)
        elif step["op"] == "inv":
            down, cells = opened[step["key"]]
            maps.append(transpose_map(down))
        else:
            maps.append(None)
    return maps


def run(layers, maps, x, conv, concat):
    """Logits, and the features after every convolution."""
    kept, seen, name = {}, {"input": x}, "input"
    for i, ((step, weight, bias), kernel_map) in enumerate(zip(layers, maps, strict=True)):
        if step["op"] == "save":
            kept[step["key"]] = (name, x)
        elif step["op"] == "cat":
            x = concat(x, kept[step["key"]][1])
        elif step["op"] == "gap":
            x = global_avg_pool(x, count_absent=False)
        elif step["op"] == "linear":
            features = x.features if isinstance(x, SparseTensor) else x
            return features @ weight.T + bias, seen
        else:
            name = step["name"]
            x = seen[name] = conv(i, x, weight, bias, kernel_map)
    raise AssertionError


def float_conv(i, x, weight, bias, kernel_map):
    return sparse_conv(x, weight, bias, kernel_map=kernel_map).map(torch.relu)


def float_concat(a, b):
    return a.with_features(torch.cat([a.features, b.features], dim=1))


def steps_of(layers, amax):
    """One step per site; what is concatenated shares the larger one."""
    scale = {site: fq.compute_scale(value) for site, value in amax.items()}
    kept, name = {}, "input"
    for step, _, _ in layers:
        if step["op"] == "save":
            kept[step["key"]] = name
        elif step["op"] == "cat":
            both = torch.maximum(scale[name], scale[kept[step["key"]]])
            scale[name] = scale[kept[step["key"]]] = both
        elif "cout" in step and step["op"] != "linear":
            name = step["name"]
    return scale


def int8_network(layers, scale):
    last = max(i for i, (step, _, _) in enumerate(layers) if step["op"] in ("subm", "conv", "inv"))
    weights = {
        i: fq.quantize_params({"w": w}, {"w": WEIGHTS})["w"]
        for i, (step, w, _) in enumerate(layers)
        if step["op"] in ("subm", "conv", "inv")
    }

    def conv(i, x, weight, bias, kernel_map):
        step = None if i == last else scale[layers[i][0]["name"]]
        return sparse_conv_int8(
            x, weights[i], bias, kernel_map=kernel_map, output_scale=step, relu=True
        )

    def concat(a, b):
        q = torch.cat([a.features.q, b.features.q], dim=1)
        assert torch.equal(a.features.scale, b.features.scale)
        return a.with_features(fq.QTensor(q, a.features.scale, spec=a.features.spec))

    return conv, concat


def calibrated(layers, batches):
    observers = {s["name"]: fq.MaxObserver() for s, w, _ in layers if w is not None and "k" in s}
    observers["input"] = fq.MaxObserver()

    def activations(batch):
        x, maps = batch
        seen = run(layers, maps, x, float_conv, float_concat)[1]
        return {site: value.features for site, value in seen.items()}

    stats = fq.calibrate(activations, batches, observers, progress=False)
    return steps_of(layers, fq.observed_amax(stats, observers))


def quantized_logits(layers, scale, x, maps):
    conv, concat = int8_network(layers, scale)
    return run(layers, maps, fq.quantize(x, scale["input"]), conv, concat)[0]


def card_of(layers, scale):
    """The network as a card: what a file of it holds."""
    weights, biases, maps, card, kept = {}, {}, [], [], {}
    cells, name = "input", "input"
    last = max(i for i, (step, _, _) in enumerate(layers) if step["op"] in ("subm", "conv", "inv"))
    for i, (step, weight, bias) in enumerate(layers):
        op = step["op"]
        if op == "save":
            kept[step["key"]] = (name, cells)
            continue
        below, name = name, step.get("name", f"{op}{i}")
        if op == "cat":
            card.append(CardLayer(name, op, (below, kept[step["key"]][0])))
        elif op == "gap":
            card.append(CardLayer(name, "global_avg_pool", (below,)))
        elif op == "linear":
            weights[name], biases[name] = weight, bias
            card.append(CardLayer(name, op, (below,)))
        else:
            kernel = tuple(weight.shape[1:-1])
            ones = (1,) * len(kernel)
            if op == "subm":
                one = CardMap(f"subm {cells} {kernel}", op, cells, kernel, dilation=ones)
            elif op == "conv":
                step_size, border = ((step[key],) * len(kernel) for key in ("s", "p"))
                one = CardMap(name, op, cells, kernel, step_size, border, ones)
                kept[f"map {step.get('key')}"] = one
            else:
                one = CardMap(name, "inverse", kept[f"map {step['key']}"].key)
            maps += [one] * (one not in maps)
            cells = cells if op == "subm" else one.key
            weights[name] = fq.quantize_params({"w": weight}, {"w": WEIGHTS})["w"]
            biases[name] = bias
            card.append(CardLayer(name, "conv", (below,), one.key, relu=True))
    floats = {layers[last][0]["name"]}
    return network_card(
        maps, card, weights, biases, {n: s for n, s in scale.items() if n not in floats}
    )


def check_card(name, layers, scale, x, expected, path):
    """A card gives the same logits after a file, whose size is a quarter of the float file's."""
    save_network_card(path, card_of(layers, scale))
    card = load_network_card(path)
    actual = run_card(card, x, card_maps(card, x))
    actual = actual.features if isinstance(actual, SparseTensor) else actual
    assert torch.equal(actual, expected)
    share = path.stat().st_size / (DATA / "models" / f"{name}.safetensors").stat().st_size
    print(f"network card: {share:.4f} of the float file's size")
    assert share <= 0.27


def mnist(images):
    return SparseTensor.from_dense(torch.from_numpy(images).float().unsqueeze(1) / 255)


def test_digits_in_float_and_in_int8(tmp_path):
    layers = load("sp2d_mnist_a")
    data = np.load(DATA / "mnist" / "mnist_open.npz")
    expected = np.load(DATA / "expected" / "sp2d_mnist_a_logits.npz")["logits"]
    x = mnist(data["test_x"])
    maps = make_maps(layers, x)
    labels = torch.from_numpy(data["test_y"]).long()
    exact, _ = run(layers, maps, x, float_conv, float_concat)
    # Float sums of up to 576 products in another order, through six layers.
    assert np.allclose(exact[:500].numpy(), expected, atol=2e-3)
    assert (exact.argmax(1) == labels).float().mean() == pytest.approx(0.98, abs=1e-6)
    train = mnist(data["train_x"][:256])
    scale = calibrated(layers, [(train, make_maps(layers, train))])
    integers = quantized_logits(layers, scale, x, maps)
    check_card("sp2d_mnist_a", layers, scale, x, integers, tmp_path / "card")
    accuracy = (integers.argmax(1) == labels).float().mean().item()
    agreement = (integers.argmax(1) == exact.argmax(1)).float().mean().item()
    noise = (integers - exact).double().square().sum()
    decibels = 10 * math.log10(exact.double().square().sum() / noise)
    print(f"int8: accuracy {accuracy:.4f}, agreement {agreement:.4f}, logits {decibels:.2f} dB")
    assert accuracy >= 0.979
    assert agreement >= 0.998
    assert decibels >= 34


def voxels(train):
    cloud = np.load(DATA / "lidar" / "pdal_autzen.npz")
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
    layers = load("sp3d_autzen_unet")
    (x, cell), labels = voxels(train=False)
    recorded = np.load(DATA / "expected" / "sp3d_autzen_unet_logits.npz")
    assert np.array_equal(x.coords.numpy(), recorded["coords"])
    maps = make_maps(layers, x)
    exact, _ = run(layers, maps, x, float_conv, float_concat)
    assert np.allclose(exact.numpy(), recorded["logits"], atol=5e-3)
    in_float = mean_iou(exact.argmax(1)[cell], labels)
    assert in_float == pytest.approx(65.50, abs=0.02)
    (train, _), _ = voxels(train=True)
    scale = calibrated(layers, [(train, make_maps(layers, train))])
    integers = quantized_logits(layers, scale, x, maps)
    check_card("sp3d_autzen_unet", layers, scale, x, integers, tmp_path / "card")
    in_int8 = mean_iou(integers.argmax(1)[cell], labels)
    print(f"mean IoU: float {in_float:.2f}, int8 {in_int8:.2f}")
    assert in_int8 >= in_float - 0.5
