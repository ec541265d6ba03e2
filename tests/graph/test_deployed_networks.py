"""Trained networks on real data: the lowered program against the Q/DQ graph, site by site."""

import sys
import zlib

import numpy as np
import pytest
import torch

import fquant as fq
from fquant.graph import (
    dynamic_rows,
    is_dequantize,
    is_quantize,
    save_program,
    site_integers,
)
from fquant.sparse_network import make_maps
from fquant.testing.scenes import load_arrays
from tests.sparse.test_real_networks import DATA, load, mnist, network, voxels
from tests.test_accuracy import read_safetensors

pytestmark = pytest.mark.skipif(
    not (DATA / "models").is_dir(), reason=f"no trained networks in {DATA}"
)


def compared(program, lowered, *args):
    """(share of equal integers at the worst site, largest difference in steps) over all sites.

    Each layer reads the Q/DQ graph's integers: a difference of one step is not handed on to others.
    """
    before = site_integers(program, *args)
    after = site_integers(lowered, *args, given=before)
    worst, furthest = 1.0, 0
    assert len(after) >= 5
    for name, q in after.items():
        steps = (q.int() - before[name].int()).abs()
        worst = min(worst, (steps == 0).float().mean().item())
        furthest = max(furthest, int(steps.max()))
    return worst, furthest


def deployed(model, rules, batches, args, **options):
    params = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    params = {name: p.detach() for name, p in params.items()}
    plan = fq.make_plan(model, rules, args)
    stats = fq.calibrate_model(model, plan, params, batches, progress=False)
    program = fq.export_qdq(
        model, plan, params, fq.finalize(plan, stats), args, weights="integer", **options
    )
    return program, *fq.lower(program)


def sparse(name):
    """(layers, module with the parameters of a trained network)."""
    layers, params = load(name)
    model = network(layers)
    model.load_state_dict(params)
    return layers, model


def test_digits_on_a_sparse_network():
    layers, model = sparse("sp2d_mnist_a")
    data = load_arrays(DATA / "mnist" / "mnist_open.npz")
    train = mnist(data["train_x"][:128])
    example = (train, make_maps(layers, train))
    program, lowered, report = deployed(
        model, fq.w8a8(), [example], example, dynamic_shapes=dynamic_rows(example)
    )
    # Every layer is in integers but for the average before the last.
    assert all(layer.kernel for layer in report.layers)
    batches = [mnist(part) for part in np.split(data["test_x"][:1920], 15)]
    same = total = 0
    runs = [fq.prepack(lowered).module(), program.module()]
    for i, part in enumerate(batches):
        args = (part, make_maps(layers, part))
        if i == 0:
            worst, furthest = compared(program, lowered, *args)
            print(f"sp2d_mnist_a: {worst:.6f} of integers equal at the worst site")
            assert worst >= 0.999
            assert furthest <= 1
        y, expected = runs[0](*args), runs[1](*args)
        same += (y.argmax(1) == expected.argmax(1)).sum().item()
        total += len(y)
    print(f"sp2d_mnist_a: {same} of {total} classed alike")
    assert same / total >= 0.999


def test_airborne_lidar_on_a_sparse_u_net(tmp_path):
    layers, model = sparse("sp3d_autzen_unet")
    (x, _), _ = voxels(train=False)
    args = (x, make_maps(layers, x))
    program, lowered, report = deployed(
        model, fq.w8a8(), [args], args, dynamic_shapes=dynamic_rows(args)
    )
    assert all(layer.kernel for layer in report.layers)
    worst, furthest = compared(program, lowered, *args)
    y, expected = (p.module()(*args).features for p in (lowered, program))
    alike = (y.argmax(1) == expected.argmax(1)).float().mean().item()
    print(f"sp3d_autzen_unet: {worst:.6f} equal at the worst site, {alike:.6f} classed alike")
    save_program(lowered, tmp_path / "lowered.pt2")
    floats = (DATA / "models" / "sp3d_autzen_unet.safetensors").stat().st_size
    share = (tmp_path / "lowered.pt2").stat().st_size / floats
    print(f"sp3d_autzen_unet: {share:.4f} of the float file's size")
    assert share <= 0.27
    assert worst >= 0.999
    assert furthest <= 1
    assert alike >= 0.999


@pytest.fixture(scope="module")
def depthwise():
    """(program, lowered, report, test images) of the depthwise network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(DATA), *sys.path])
        import models
    model = models.FashionDW()
    model.load_state_dict(read_safetensors(DATA / "models" / "fashion_dw.safetensors"))
    images = load_arrays(DATA / "fashion" / "fashion_open.npz")
    train, test = (
        torch.from_numpy(images[name][:count]).float()[:, None] / 255
        for name, count in (("train_x", 256), ("test_x", 1000))
    )
    varying = (({0: torch.export.Dim.AUTO},),)
    args = (train[:16],)
    case = deployed(model.eval(), fq.w8a8(), [train], args, dynamic_shapes=varying)
    return *case, test


def test_depthwise_network(depthwise):
    program, lowered, report, test = depthwise
    assert all(layer.kernel for layer in report.layers)
    worst, furthest = compared(program, lowered, test[:100])
    y, expected = fq.prepack(lowered).module()(test), program.module()(test)
    alike = (y.argmax(1) == expected.argmax(1)).float().mean().item()
    print(f"fashion_dw: {worst:.6f} equal at the worst site, {alike:.6f} classed alike")
    assert worst >= 0.999
    assert furthest <= 1
    assert alike >= 0.999


class InDouble(torch.fx.Interpreter):
    """Runs a Q/DQ program in float64, from the same scales and integers."""

    def __init__(self, program, given):
        super().__init__(program.module(check_guards=False))
        self.given, self.seen = given, {}

    def run_node(self, n):
        if is_quantize(n) or is_dequantize(n):
            x, scale = (self.env[node].double() for node in n.args[:2])
            if is_dequantize(n):
                return x * scale
            q = (x / scale).round().clamp(-128, 127).to(torch.int8)
            self.seen.setdefault(n.args[-1], q)
            return self.given.get(n.args[-1], q)
        value = super().run_node(n)
        floats = n.op == "get_attr" and value.dtype == torch.float32
        return value.double() if floats else value


def differing(integers, expected):
    """(how many integers differ, how many there are, the share of equal ones at the last site)."""
    pairs = [(q, expected[name]) for name, q in integers.items() if name in expected]
    wrong = sum((a != b).sum().item() for a, b in pairs)
    last = (pairs[-1][0] == pairs[-1][1]).float().mean().item()
    return wrong, sum(a.numel() for a, _ in pairs), last


def test_the_first_differences_are_the_float_graphs(depthwise):
    """Layer by layer, the lowered program is nearer to exact arithmetic than float32 is."""
    program, lowered, _, test = depthwise
    x = test[:100]
    exact = InDouble(program, {})
    with torch.no_grad():
        exact.run(x.double(), enable_io_processing=False)
        for name, one in (("Q/DQ graph", program), ("lowered", lowered)):
            apart, total, _ = differing(site_integers(one, x, given=exact.seen), exact.seen)
            through, _, last = differing(site_integers(one, x), exact.seen)
            print(
                f"{name}: {apart} of {total} integers wrong layer by layer, {through} end to end, "
                f"{last:.6f} equal at the last site"
            )
            assert apart <= 2e-6 * total
            assert through <= 1e-3 * total
        ours, theirs = site_integers(lowered, x), site_integers(program, x)
        before = torch.backends.mkldnn.enabled
        try:
            torch.backends.mkldnn.enabled = False
            other = site_integers(program, x)
        finally:
            torch.backends.mkldnn.enabled = before
    for name, one in (("lowered", ours), ("Q/DQ graph by torch's other convolution", other)):
        wrong, total, last = differing(one, theirs)
        print(f"{name} against the Q/DQ graph: {wrong} of {total} differ, {last:.6f} at the last")
        assert wrong <= 1e-3 * total


def test_sizes_of_the_depthwise_network(depthwise, tmp_path):
    _, lowered, _, _ = depthwise
    floats = (DATA / "models" / "fashion_dw.safetensors").read_bytes()
    save_program(lowered, tmp_path / "lowered.pt2")
    state = sum(tensor.nbytes for tensor in lowered.state_dict.values())
    size = (tmp_path / "lowered.pt2").stat().st_size
    deflated = len(zlib.compress(floats, 9))
    print(
        f"fashion_dw: float {len(floats)}, deflated {deflated}; lowered state {state}, file {size}, "
        f"{size / len(floats):.4f} of the float file, {size / deflated:.4f} of the deflated one"
    )
    assert size <= 0.27 * len(floats)
