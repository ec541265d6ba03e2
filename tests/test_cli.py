"""The command line: what it prints and with which exit code it ends."""

import pytest

import fquant_kernels
from fquant.cli import main
from fquant_kernels.doctor import Check


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "demo" in printed
    assert "doctor" in printed


def test_demo_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--help"])
    assert stop.value.code == 0
    assert "--qat-epochs" in capsys.readouterr().out


def test_an_unknown_command_is_refused():
    with pytest.raises(SystemExit) as stop:
        main(["cure"])
    assert stop.value.code == 2


def test_missing_scikit_learn_is_said(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert "pip install 'fquant[demo]'" in capsys.readouterr().err


def test_doctor_lists_and_tests_the_backends(capsys):
    assert main(["doctor", "--seconds", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "fquant::sparse_conv_int8 on cpu" in printed
    assert "fquant::sparse_conv_int8 on cuda, triton" in printed
    for check in fquant_kernels.self_test(0.1):
        assert f"{check.backend}: " in printed


def test_doctor_fails_on_a_wrong_backend(monkeypatch, capsys):
    wrong = Check("fquant::op on cpu, cpp", 3, "case 3 differs from the reference")
    monkeypatch.setattr(fquant_kernels, "self_test", lambda seconds: [wrong])
    assert main(["doctor"]) == 1
    assert "WRONG, case 3 differs" in capsys.readouterr().out
