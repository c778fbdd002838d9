"""The benchmarks run, and what they compare is equal; speed itself is not tested."""

import importlib.util
import json

import axolotl
import pytest
from packaging.version import Version

from tests.support.tiny import ROOT


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def step():
    return load("step")


def run(module, monkeypatch, tmp_path, *arguments):
    file = tmp_path / "figures.json"
    monkeypatch.setattr(
        module, "BODY", {**module.BODY, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    )
    monkeypatch.setattr("sys.argv", ["step.py", "--quick", *arguments, "--json", str(file)])
    module.main()
    return json.loads(file.read_text())


def test_a_rival_that_is_stock_on_this_host_runs_as_stock(step):
    """axolotl collected garbage after each micro-step before 0.21."""
    own = ["stock-nogc"] if Version(axolotl.__version__) < Version("0.21") else []
    assert step.distinct(["stock-nogc", "stock", "trl"]) == [*own, "stock", "trl"]


def test_an_unknown_rival_is_refused_by_name(step, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(step, monkeypatch, tmp_path, "--against", "trl,mine")
    assert "--against knows liger, stock, stock-nogc, trl; not mine" in capsys.readouterr().err


def test_steps_of_ours_stock_and_trl_are_equal(step, monkeypatch, tmp_path):
    sizes = ["--steps", "2", "--warm-up", "0", "--tokens", "48"]
    figures = run(step, monkeypatch, tmp_path, "--against", "stock-nogc,trl", "--only", "speed", *sizes)
    cases = [found for found in figures if "contenders" in found]
    (first,) = step.distinct(["stock-nogc"])
    assert len(cases) == 4
    for case in cases:
        assert {first, "ours", "ours-warm"} <= set(case["contenders"])
        assert case["contenders"][first]["ratio"] == 1
    assert set(cases[0]["equality"]) == {first, "trl"}
    for equal in cases[0]["equality"].values():
        assert equal["logps"] < 1e-3
        assert equal["gradient"] < 1e-4


def test_memory_and_growth_are_measured(step, monkeypatch, tmp_path):
    sizes = ["--steps", "3", "--warm-up", "0", "--tokens", "64"]
    _, memory = run(step, monkeypatch, tmp_path, "--only", "memory", "--against", "trl", *sizes)
    assert memory["memory"]["peak_mib"]["ours"] > 0
    assert set(memory["share_of"]) == {"trl"}
    _, growth = run(step, monkeypatch, tmp_path, "--only", "growth", *sizes)
    assert set(growth["growth"]["us_per_token_without_attention"]) == {"64", "128"}
