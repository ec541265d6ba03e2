"""What is saved is what is loaded, whatever the tree is made of; what cannot be saved is named."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

import fquant as fq
from fquant.pytree import record, static
from fquant.testing.models import EXAMPLES
from tests.serialization.files import assert_identical, round_trip

pytest.importorskip("safetensors")


@record
class Mine:
    """A record of a user."""

    q: Tensor
    note: str = static(default="")


class Pair(NamedTuple):
    """A NamedTuple of a user."""

    left: Tensor
    right: int


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([torch.float32, torch.int8, fq.QuantSpec(4, axis=(0, 1)), fq.NF4])
    | hnp.arrays("float32", hnp.array_shapes(min_dims=0, min_side=0)).map(torch.from_numpy)
)
TREES = st.recursive(
    PLAIN,
    lambda below: (
        st.lists(below, max_size=3)
        | st.lists(below, max_size=3).map(tuple)
        | st.dictionaries(
            st.text() | st.integers(-1, 3) | st.sampled_from(["a", "1", "a/b", "__metadata__"]),
            below,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=60)
@given(TREES)
def test_any_tree(tree):
    assert_identical(round_trip(tree), tree)


def test_fine_tuning_goes_on_where_it_was_saved(tmp_path):
    """Model, scales, optimizer and schedule in one file: the next steps are the same, bit for bit."""
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    rules = [fq.OpRule(weight=fq.Quantizer(fq.QuantSpec(4), learn="lsq"), inputs=fq.QuantSpec(8))]
    plan = fq.make_plan(network, rules, (x,))
    stats = fq.calibrate_model(network, plan, network.state_dict(), [x], progress=False)
    qstate = fq.finalize(plan, stats)

    def start():
        module = fq.FakeQuantized(network, plan, qstate).train()
        optimizer = torch.optim.Adam(module.parameters(), 1e-3)
        return module, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])

    def steps(module, optimizer, schedule):
        for _ in range(2):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
            schedule.step()
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}

    first = start()
    steps(*first)
    fq.save(tmp_path / "checkpoint", [part.state_dict() for part in first])
    expected = steps(*first)
    again = start()
    for part, state in zip(again, fq.load(tmp_path / "checkpoint"), strict=True):
        part.load_state_dict(state)
    assert_identical(steps(*again), expected)


def test_names_of_tensors_never_collide():
    a, b, c = torch.ones(1), torch.zeros(2), torch.full((3,), 2.0)
    tree = {"a/b": a, "a": {"b": b, "b~": c}, "__metadata__": a + 1, "": b + 1}
    assert_identical(round_trip(tree), tree)
    assert_identical(round_trip(a), a)


def test_a_model_with_all_its_state():
    example = EXAMPLES["residual"]
    model = example.model().float()
    params = {n: p.detach() for n, p in [*model.named_parameters(), *model.named_buffers()]}
    x = example.inputs()[0].float()
    rules = [*fq.skip("stem"), fq.OpRule(inputs=fq.Quantizer(observer=fq.HistogramObserver()))]
    plan = fq.make_plan(model, rules, (x,))
    stats = fq.calibrate_model(model, plan, params, [x], progress=False)
    tree = {
        "params": params,
        "stats": stats,
        "qstate": fq.finalize(plan, stats),
        "plan": plan,
        "rules": rules,
        "fine_tuning": fq.fine_tuning(100, 0.1),
    }
    loaded = round_trip(tree)
    assert_identical(loaded, tree)
    assert loaded["plan"] == plan
    assert loaded["rules"] == rules
    expected = fq.fake_quant(model, plan)(params, tree["qstate"], x)
    actual = fq.fake_quant(model, loaded["plan"])(loaded["params"], loaded["qstate"], x)
    assert torch.equal(actual, expected)
    assert_identical(
        fq.calibrate_model(model, plan, params, [x], loaded["stats"], progress=False),
        fq.calibrate_model(model, plan, params, [x], stats, progress=False),
    )


OBSERVERS = [
    fq.MaxObserver(axis=0),
    fq.MinMaxObserver(),
    fq.MovingAverageObserver(momentum=0.5, axis=0),
    fq.HistogramObserver(axis=0, num_bins=64, skip_zeros=True),
    fq.FixedWidthHistogramObserver(num_bins=16),
]


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: type(o).__name__)
def test_observers_and_their_states(observer):
    state = observer.update(observer.init(), torch.randn(3, 5))
    tree = {"observer": observer, "state": state, "start": observer.init()}
    loaded = round_trip(tree)
    assert_identical(loaded, tree)
    assert torch.equal(loaded["observer"].amax(loaded["state"]), observer.amax(state))


def test_classes_of_a_user():
    tree = (Mine(torch.ones(2), "mine"), Pair(torch.zeros(()), 3))
    assert_identical(round_trip(tree, Mine, Pair), tree)
    with pytest.raises(ValueError, match="'Mine' is no known class"):
        round_trip(tree)


def test_one_tensor_in_two_places_is_one_again():
    weight = torch.nn.Parameter(torch.randn(2, 2))
    loaded = round_trip({"embed": weight, "head": weight, "view": weight.detach()[0]})
    assert loaded["embed"] is loaded["head"]
    assert not loaded["embed"].requires_grad
    assert torch.equal(loaded["view"], weight[0])


def test_views_are_saved_as_their_values_only(tmp_path):
    big = torch.zeros(1000, 1000)
    fq.save(tmp_path / "view", {"column": big[:, 3], "turned": big[:4, :4].T, "conj": big[0, :1]})
    assert (tmp_path / "view").stat().st_size < 20_000


def test_lazily_conjugated_and_negated_views_are_saved_as_their_values():
    x = torch.tensor([1 + 2j, 3 - 4j])
    assert torch.equal(round_trip(x.conj()), torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(round_trip(x.conj().imag), torch.tensor([-2.0, 4.0]))


def test_what_loads_is_independent_of_the_file(tmp_path):
    fq.save(tmp_path / "x", torch.zeros(1000))
    x = fq.load(tmp_path / "x")
    fq.save(tmp_path / "x", torch.ones(1000))
    assert x.sum() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_from_cuda_to_cpu_and_back(tmp_path):
    x = fq.quantize(torch.randn(4, 4, device="cuda"), 0.1)
    fq.save(tmp_path / "x", x)
    assert fq.load(tmp_path / "x").q.device.type == "cpu"
    assert_identical(fq.load(tmp_path / "x", device="cuda"), x)


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": [object()]}, TypeError, "save: tree must hold tensors.* got object at 'a/0'"),
        ({"a": {1.5: 2}}, TypeError, "save: dicts must have strings or .* keys, got 1.5 at 'a'"),
        ({True: 2}, TypeError, "save: dicts must have strings or .* keys, got True at ''"),
        ([torch.empty(2, device="meta")], ValueError, "save: tensors must be dense.* meta at '0'"),
        ([torch.zeros(2).to_sparse()], ValueError, "save: tensors must be dense.* at '0'"),
        ({1, 2}, TypeError, "save: tree must hold .* got set at ''"),
    ],
)
def test_bad_input_is_named(tree, error, message, tmp_path):
    with pytest.raises(error, match=message):
        fq.save(tmp_path / "x", tree)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    fq.save(tmp_path / "x", torch.ones(2))

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        fq.save(tmp_path / "x", torch.zeros(2))
    monkeypatch.undo()
    assert torch.equal(fq.load(tmp_path / "x"), torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_without_safetensors_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'fquant\[files\]'"):
        fq.save(tmp_path / "x", torch.ones(2))
