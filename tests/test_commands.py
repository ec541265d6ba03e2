"""`fquant quantize` and `fquant inspect`: files, what is printed, and exit codes."""

import contextlib
import io
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fquant as fq
from fquant.cli import main
from fquant.commands.table import print_table

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.usefixtures("onnx_parsed_once")
for package in ("yaml", "safetensors", "onnxscript"):
    pytest.importorskip(package)

MODULE = """
    import torch

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 4))

    def batches():
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            yield torch.randn(8, 64, generator=generator)

    def broken():
        raise RuntimeError("out of eggs")

    def pairs():
        return [[batch, 0] for batch in batches()]

    nothing = []
    number = 3
"""
RECIPE = """
    model: {name}:model
    data: {name}:batches
    rules:
      - {{kind: OpRule, path: "2", weight: {{kind: QuantSpec, num_bits: 4, narrow_range: true}}}}
      - w8a8
    calibration:
      batches: 3
    export:
      weights: integer
    outputs:
      state: state.safetensors
      program: model.pt2
      onnx: model.onnx
"""


def written(folder, name, recipe=RECIPE):
    (folder / f"{name}.py").write_text(textwrap.dedent(MODULE))
    path = folder / "recipe.yaml"
    path.write_text(textwrap.dedent(recipe.format(name=name)))
    return path


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, onnx_parsed_once):
    """The folder after one run of the recipe, and what it printed."""
    folder = tmp_path_factory.mktemp("quantize")
    path = written(folder, "a_network_of_mine")
    printed, progress = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(progress):
        assert main(["quantize", str(path)]) == 0, progress.getvalue()
    return folder, printed.getvalue(), progress.getvalue()


def test_quantize_writes_what_the_recipe_says(outputs):
    folder, printed, progress = outputs
    assert "calibrate" in progress  # the progress bar
    lines = printed.splitlines()
    row = next(line.split() for line in lines if line.strip().startswith("2/linear#0.weight"))
    assert row[:3] == ["2/linear#0.weight", "int4", "4"]
    assert any(line.startswith("3 batches, ") for line in lines)
    state = fq.load(folder / "state.safetensors")
    sys.path.insert(0, str(folder))
    try:
        import a_network_of_mine as network
    finally:
        sys.path.remove(str(folder))
    model, batches = network.model(), list(network.batches())
    params = {name: p.detach() for name, p in model.named_parameters()}
    plan = fq.make_plan(model, state["rules"], (batches[0],))
    assert state["plan"] == plan
    qstate = fq.finalize(plan, fq.calibrate_model(model, plan, params, batches[:3], progress=False))
    assert state["qstate"].keys() == qstate.keys()
    assert all(torch.equal(state["qstate"][name], scale) for name, scale in qstate.items())
    program = torch.export.load(folder / "model.pt2")
    expected = fq.fake_quant(model, plan)(params, qstate, batches[4][:3])
    assert torch.equal(program.module()(batches[4][:3]), expected)
    assert "integers.0_linear_0_weight" in program.state_dict


def test_inspect_says_what_is_in_each(outputs, capsys):
    folder, *_ = outputs
    assert main(["inspect", str(folder / "state.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "params/0.weight" in printed
    assert "96x64" in printed
    assert "2/linear#0  Linear  [0]" in printed  # the plan's own table
    assert main(["inspect", str(folder / "model.pt2")]) == 0
    printed = capsys.readouterr().out
    assert "integers.0_linear_0_weight" in printed
    assert "0/linear#0.weight  DQ of stored integers  int8 narrow  axis 0" in printed
    assert main(["inspect", str(folder / "model.onnx")]) == 0
    printed = capsys.readouterr().out
    assert "0/linear#0.weight  DQ of stored integers  int8  axis 0" in printed
    assert "2/linear#0.weight  DQ of stored integers  int4  axis 0" in printed


def test_inspect_shows_records_and_plain_safetensors(tmp_path, capsys):
    q = fq.quantize(torch.ones(2, 3), 0.5, spec=fq.QuantSpec(4, unsigned=True))
    fq.save(tmp_path / "tree", {"q": {0: q, 1: fq.pack(q)}, "none": None})
    assert main(["inspect", str(tmp_path / "tree")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["q/0", "uint4", "int8", "2x3", "6", "B", "0.5"] in rows
    assert ["q/1", "uint4", "uint8", "2x2", "4", "B", "0.5"] in rows
    import safetensors.torch

    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "plain")
    assert main(["inspect", str(tmp_path / "plain")]) == 0
    assert "x     tensor  float32  2" in capsys.readouterr().out


def test_inspect_shows_network_cards(tmp_path, capsys):
    from fquant.serialization import CardLayer, CardMap, network_card, save_network_card

    weight = fq.quantize(torch.ones(2, 3, 3, 1), torch.full((2, 1, 1, 1), 0.5))
    card = network_card(
        [CardMap("m", "subm", kernel_size=(3, 3), dilation=(1, 1))],
        [CardLayer("c", "conv", ("input",), "m", relu=True)],
        {"c": weight},
        {},
        {"input": torch.tensor(0.5), "c": torch.tensor(0.25)},
    )
    save_network_card(tmp_path / "card", card)
    assert main(["inspect", str(tmp_path / "card")]) == 0
    printed = capsys.readouterr().out
    assert "c      conv + relu  input   m    int8 2x3x3x1  0.25" in printed
    assert "subm  input   (3, 3)" in printed


def test_inspect_of_what_is_no_such_file(outputs, tmp_path, capsys):
    folder, *_ = outputs
    assert main(["inspect", str(tmp_path / "missing")]) == 2
    assert "FILE must be a file" in capsys.readouterr().err
    for name in ("state.safetensors", "model.pt2", "model.onnx"):
        data = (folder / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        assert main(["inspect", str(tmp_path / name)]) == 1
        assert f"{name}' must be" in capsys.readouterr().err
    model = onnx.load(folder / "model.onnx")
    del next(n for n in model.graph.node if n.op_type == "DequantizeLinear").input[:]
    onnx.save(model, tmp_path / "model.onnx")
    assert main(["inspect", str(tmp_path / "model.onnx")]) == 1
    assert "model.onnx' must be an ONNX model" in capsys.readouterr().err
    (tmp_path / "text").write_text("hello")
    assert main(["inspect", str(tmp_path / "text")]) == 1
    assert "must be a safetensors file, a program" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("model: {name}:model\n    ", "", 2, "model must be there"),
        ("{name}:model", "{name}", 2, "model must be an import path like package.module:name"),
        ("{name}:model", "no_such_module_here:f", 2, "model must be in a module that is there"),
        (
            "{name}:model",
            "{name}:nothing_like_it",
            2,
            "model must be there: .* has no 'nothing_like",
        ),
        ("{name}:model", "{name}:number", 2, "model must be an nn.Module, got int"),
        ("{name}:batches", "{name}:nothing", 3, "data must have at least one batch, got none"),
        ("{name}:batches", "{name}:number", 3, "data must be an iterable, got int"),
        ("{name}:batches", "{name}:pairs", 3, "data must give what .*got a list of 2; of a loader"),
        ("- w8a8", "- w9a9", 6, r"rules.1 must be a rule or one of .*, got 'w9a9'"),
        ("num_bits: 4", "num_bits: 40", 5, r"rules.0 must be a rule: QuantSpec: num_bits must be"),
        ("num_bits", "bits", 5, r"rules.0 must be a rule: from_dict: QuantSpec must have fields"),
        ("kind: OpRule, path", "kind: OpRules, path", 5, r"rules.0 must be a rule: .*known class"),
        ("batches: 3", "batches: many", 8, "calibration.batches must be of type int, got 'many'"),
        ("batches: 3", "batches: 0", 8, "calibration.batches must be at least 1, got 0"),
        ("batches: 3", "batch: 3", 8, "calibration.batch must be a key among batches, got 'batch'"),
        ("weights: integer", "weights: int8", 10, "export.weights must be 'float' or 'integer'"),
        ("onnx: model.onnx", "tflite: model.tflite", 14, "outputs.tflite must be a key among"),
        ("onnx: model.onnx", "onnx: no/model.onnx", 14, "outputs.onnx must be in a folder that is"),
        ("data:", "params: none.bin\n    data:", 3, "params must be a file of tensors"),
        (
            "data:",
            "params: recipe.yaml\n    data:",
            3,
            "params must be .*recipe.yaml, which is not safe.* torch.save is a pickle",
        ),
        ("calibration:", "calibration", 7, "must be YAML, got could not find expected ':'"),
    ],
)
def test_a_recipe_that_is_not_right(old, new, line, message, tmp_path, capsys):
    import re

    assert old in RECIPE
    path = written(tmp_path, "another_network_of_mine", RECIPE.replace(old, new, 1))
    sys.modules.pop("another_network_of_mine", None)
    assert main(["quantize", str(path), "--no-progress"]) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    found = int(re.search(r"recipe\.yaml:(\d+):", printed).group(1))
    assert abs(found - line) <= (1 if "YAML" in message else 0), printed
    assert {p.name for p in tmp_path.iterdir()} <= {
        *("recipe.yaml", "another_network_of_mine.py", "__pycache__")
    }


def test_a_failure_of_the_model_is_1(tmp_path, capsys):
    path = written(tmp_path, "broken_network", RECIPE.replace("{name}:batches", "{name}:broken"))
    assert main(["quantize", str(path)]) == 1
    printed = capsys.readouterr().err
    assert printed.endswith("\nfquant quantize: RuntimeError: out of eggs\n")
    assert 'broken_network.py", line' in printed  # where it failed


def test_a_recipe_that_is_not_there_is_2(tmp_path, capsys):
    assert main(["quantize", str(tmp_path / "recipe.yaml")]) == 2
    assert "must be a file that can be read" in capsys.readouterr().err


def test_parameters_from_a_file(tmp_path, capsys):
    recipe = RECIPE.replace("data:", "params: trained\n    data:")
    recipe = recipe[: recipe.index("      program:")]
    path = written(tmp_path, "trained_network", recipe)
    params = {"0.weight": torch.ones(96, 64), "0.bias": torch.ones(96)}
    fq.save(tmp_path / "trained", {"params": params})
    assert main(["quantize", str(path), "--no-progress"]) == 0
    loaded = fq.load(tmp_path / "state.safetensors")["params"]
    assert torch.equal(loaded["0.weight"], params["0.weight"])
    assert loaded["2.weight"].shape == (4, 96)
    for wrong, message in (
        ("1.weight", "must name tensors of the model"),
        ("2.bias", "must be (4,)"),
    ):
        fq.save(tmp_path / "trained", {wrong: torch.ones(3)})
        assert main(["quantize", str(path), "--no-progress"]) == 2
        assert message in capsys.readouterr().err


def test_without_yaml_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert main(["quantize", str(written(tmp_path, "some_network"))]) == 1
    assert "pip install 'fquant[yaml]'" in capsys.readouterr().err


def test_tables_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    print_table("sizes", ["name", "bytes"], [["[bold]weight", 12]])
    printed = capsys.readouterr().out
    assert "[bold]weight" in printed
    assert "┃" in printed


def test_the_recipe_in_the_docs_is_read(tmp_path):
    from fquant.commands import recipe

    yaml = pytest.importorskip("yaml")
    text = textwrap.dedent(recipe.__doc__.split("\n\n")[1])
    data = yaml.safe_load(text)
    assert data.keys() == set(recipe.KEYS[""])
    for key in ("calibration", "export", "outputs"):
        assert data[key].keys() <= set(recipe.KEYS[key])
    assert Path(data["outputs"]["onnx"]).suffix == ".onnx"
