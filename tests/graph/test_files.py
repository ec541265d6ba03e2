"""Programs in files: small, without pickle, and the same when they are loaded."""

import pickle
import zipfile

import pytest
import torch
from torch import nn

import fquant as fq
from fquant.cli import main
from fquant.commands.program_archive import read_program_archive
from fquant.graph import save_program
from tests.graph.programs import exported


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 8))
    args = (torch.randn(1000, 512)[:2],)  # a view of 2 MB
    shapes = (({0: torch.export.Dim("batch")},),)
    return exported(model, args, weights="integer", dynamic_shapes=shapes)


def test_a_saved_program_is_the_same_and_a_quarter_of_the_float_size(program, tmp_path):
    path, x = tmp_path / "lowered.pt2", torch.randn(3, 512)
    lowered = fq.lower(program).program
    inputs = lowered.example_inputs
    save_program(lowered, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    loaded = torch.export.load(path)
    assert torch.equal(loaded.module()(x), lowered.module()(x))
    assert loaded.example_inputs is None
    assert lowered.example_inputs is inputs  # not written
    assert any("stack_trace" in n.meta or "from_node" in n.meta for n in program.graph.nodes)
    floats = 4 * (512 * 256 + 256 + 256 * 8 + 8)
    assert path.stat().st_size <= 0.27 * floats
    with zipfile.ZipFile(path) as archive:
        model = archive.read("archive/models/model.json")
        assert b"stack_trace" not in model
        assert b"from_node" not in model
        for name in archive.namelist():
            assert not archive.read(name).startswith((b"\x80", b"PK"))  # no pickle


class Mixed(nn.Module):
    """State of several kinds: large and small, tied, empty, part of a tensor, trained."""

    def __init__(self):
        super().__init__()
        self.big = nn.Parameter(torch.randn(300, 100))
        self.first = nn.Parameter(torch.randn(5))
        self.tied = self.first
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("rows", torch.randn(6, 3)[1:4])
        self.register_buffer("odd", torch.arange(3, dtype=torch.int8))
        self.register_buffer("codes", torch.arange(100, dtype=torch.int8).flip(0))
        self.register_buffer("wide", torch.tensor([2**40]))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("scale", torch.tensor(0.3))

    def forward(self, x):
        total = sum(t.double().sum() for t in (*self.parameters(), *self.buffers()))
        return x * (total + self.tied.sum())


def test_tensors_share_entries_and_keep_what_they_are(tmp_path):
    x, path = torch.ones(2), tmp_path / "mixed.pt2"
    program = torch.export.export(Mixed(), (x,))
    for _ in range(2):  # the second time what was loaded, whose tensors share memory
        save_program(program, path)
        loaded = torch.export.load(path)
        assert torch.equal(loaded.module()(x), program.module()(x))
        assert list(loaded.state_dict) == list(program.state_dict)
        for name, tensor in program.state_dict.items():
            other = loaded.state_dict[name]
            assert type(other) is type(tensor)
            assert (other.dtype, other.requires_grad) == (tensor.dtype, tensor.requires_grad), name
            assert torch.equal(other, tensor), name
            assert other.storage_offset() * other.itemsize % 64 == 0, name
            assert other.untyped_storage().nbytes() <= max(2**16, tensor.nbytes)
        aliases = [loaded.state_dict[name].data_ptr() for name in ("first", "tied")]
        assert aliases[0] == aliases[1]
        with zipfile.ZipFile(path) as archive:
            # float32 that is trained or not and the large one of them, int8, int64, the empty tensor
            assert sum("/weight_" in name for name in archive.namelist()) == 6
        told = read_program_archive(path).tensors
        for name, tensor in program.state_dict.items():
            assert (told[name].shape, told[name].nbytes) == (tuple(tensor.shape), tensor.nbytes)
            assert tensor.numel() == 0 or torch.equal(told[name].value, tensor), name
        program = loaded


class Trap:
    def __reduce__(self):
        return (exec, ("import fquant; fquant.trapped = True",))


def test_inspect_unpickles_nothing(program, tmp_path, capsys):
    path = tmp_path / "trap.pt2"
    save_program(program, tmp_path / "program.pt2")
    with zipfile.ZipFile(tmp_path / "program.pt2") as source, zipfile.ZipFile(path, "w") as file:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("weights_config.json"):
                data = data.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
            elif name.endswith(("sample_inputs/model.pt", "weight_0")):
                data = pickle.dumps(Trap())
            file.writestr(name, data)
    assert main(["inspect", str(path)]) == 0
    assert not hasattr(fq, "trapped")
    printed = capsys.readouterr().out
    assert "0/linear#0.weight  DQ of stored integers  int8 narrow  axis 0" in printed
    assert "fquant.quantize.default    2" in printed


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("archive/models/model.json", b"{"),
        ("archive/models/model.json", b"[]"),
        ("archive/models/model.json", b'{"graph_module": {"graph": {"nodes": 3}}}'),
        (
            "archive/data/weights/model_weights_config.json",
            b'{"config": {"a": {"tensor_meta": 1}}}',
        ),
        ("archive/models/other.json", None),
    ],
)
def test_inspect_names_a_file_that_is_none(name, data, program, tmp_path, capsys):
    path = tmp_path / "damaged.pt2"
    save_program(program, tmp_path / "program.pt2")
    with zipfile.ZipFile(tmp_path / "program.pt2") as source, zipfile.ZipFile(path, "w") as file:
        for each in source.namelist():
            if data is None and each.endswith("model.json"):
                continue
            file.writestr(each, data if each == name else source.read(each))
    assert main(["inspect", str(path)]) == 1
    assert "must be a program of torch.export.save" in capsys.readouterr().err
