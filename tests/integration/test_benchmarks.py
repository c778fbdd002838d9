"""The benchmarks run, and what they compare is equal; speed itself is not tested."""

import importlib.util
import json

import pytest

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


def test_steps_of_ours_and_stock_are_equal(step, monkeypatch, tmp_path):
    monkeypatch.delitem(step.MAKERS, "liger")
    figures = run(step, monkeypatch, tmp_path, "--only", "speed", "--steps", "2", "--warm-up", "0", "--tokens", "48")
    cases = [found for found in figures if "contenders" in found]
    assert len(cases) == 4
    for case in cases:
        assert {"stock-nogc", "ours", "ours-warm"} <= set(case["contenders"])
    assert cases[0]["equality"]["logps"] < 1e-3
    assert cases[0]["equality"]["gradient"] < 1e-4


def test_memory_and_growth_are_measured(step, monkeypatch, tmp_path):
    sizes = ["--steps", "3", "--warm-up", "0", "--tokens", "64"]
    _, memory = run(step, monkeypatch, tmp_path, "--only", "memory", *sizes)
    assert memory["memory"]["peak_mib"]["ours"] > 0
    _, growth = run(step, monkeypatch, tmp_path, "--only", "growth", *sizes)
    assert set(growth["growth"]["us_per_token_without_attention"]) == {"64", "128"}
