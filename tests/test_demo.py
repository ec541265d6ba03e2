"""The demo, short: the chain from float to int8 holds together on real digits."""

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits ship inside scikit-learn")

from fquant.demo.data import load_digits, make_batch
from fquant.demo.run import run_demo
from fquant.demo.training import WEIGHT_DECAY, adam_init, adam_step


def test_demo_from_float_to_int8(tmp_path, capsys):
    picture = tmp_path / "demo.png"
    result = run_demo(epochs=4, qat_epochs=1, picture=picture, progress=False)
    float_row, ptq, qat, int8, compiled = result.rows
    accuracy = {
        row.name: (row.logits.argmax(1) == result.labels).float().mean().item()
        for row in result.rows
    }
    assert accuracy["float"] > 0.9
    assert accuracy["int8"] > accuracy["float"] - 0.02
    assert result.equal_integers > 0.999
    assert result.different_classes <= 1
    assert result.compiled_is_eager
    assert not result.mutated
    assert torch.equal(int8.logits, compiled.logits)
    assert int8.parameter_bytes < 0.27 * float_row.parameter_bytes
    assert not torch.equal(ptq.logits, float_row.logits)
    assert not torch.equal(ptq.logits, qat.logits)
    assert "int8, compiled" in capsys.readouterr().out
    assert picture.stat().st_size > 10_000


def test_split_is_fixed_and_complete():
    split = load_digits()
    assert (len(split.train_images), len(split.test_images)) == (1347, 450)
    assert torch.equal(load_digits().test_labels, split.test_labels)


def test_every_image_keeps_a_cell():
    split = load_digits()
    batch = make_batch(split.test_images, split.test_labels)
    assert batch.maps.patch_to_image.out_coords[:, 0].tolist() == list(range(450))


def test_adamw_against_torch():
    params = {"w": torch.tensor([1.0, -2.0])}
    theirs = torch.nn.Parameter(params["w"].clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.1, weight_decay=WEIGHT_DECAY)
    state = adam_init(params)
    for _ in range(5):
        gradients = {"w": 2 * params["w"]}
        theirs.grad = 2 * theirs.detach()
        optimizer.step()
        params, state = adam_step(params, gradients, state, 0.1)
    assert torch.allclose(params["w"], theirs.detach(), atol=1e-6)
