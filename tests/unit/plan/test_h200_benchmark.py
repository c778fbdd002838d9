"""The benchmark of the 72B shape, on its small one."""

import importlib.util
import json
import math
import statistics
import sys

import pytest
import torch

from tests.support import tiny

PARTS = {"policy_forward", "reference_forward", "head", "backward", "optimizer"}


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("h200_72b", tiny.ROOT / "benchmarks" / "h200_72b.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def run(bench, folder, *arguments):
    file = folder / "made" / "figures.json"
    bench.main(["--small", "--steps", "2", "--json", str(file), *arguments])
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def found(bench, tmp_path_factory):
    return run(bench, tmp_path_factory.mktemp("figures"))


def assert_agree(first):
    ours, stock = first["ours_cold"], first["stock"]
    assert ours["loss"] == pytest.approx(stock["loss"], abs=1e-4)
    assert ours["logps"] == pytest.approx(stock["logps"], abs=1e-3)
    assert ours["grad_norm"] == pytest.approx(stock["grad_norm"], rel=1e-3)
    assert ours["grad_norm"] > 1e-2


def test_every_shape_has_figures_of_every_contender(bench, found):
    shapes = [(one["tokens"], one["prompt_percent"]) for one in found["shapes"]]
    assert sorted(shapes) == [(tokens, percent) for tokens in (32, 64) for percent in (30, 50, 70)]
    assert found["left_out"] == []
    for one in found["shapes"]:
        assert set(one["contenders"]) == set(bench.CONTENDERS)
        for figures in one["contenders"].values():
            assert len(figures["seconds"]) == 2
            assert 0 < figures["from"] <= figures["pairs_per_second"] <= figures["to"]
            assert figures["tflop_per_second"] > 0
            assert ("peak_gib" in figures) == torch.cuda.is_available()
        assert one["contenders"]["stock"]["times_stock"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="bf16 there")
def test_ours_and_stock_have_the_same_loss_gradient_and_log_probs(found):
    for one in found["shapes"]:
        assert_agree(one["first_step"])
    losses = [one["first_step"]["ours_cold"]["loss"] for one in found["shapes"]]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert max(abs(loss - math.log(2)) for loss in losses[1:]) > 1e-4  # the policy has moved since


def test_parts_add_up_to_the_step(found):
    shares = []
    for one in found["shapes"]:
        split = dict(one["split_ms"])
        whole = split.pop("whole")
        assert set(split) == PARTS
        assert min(split.values()) > 0
        shares.append(sum(split.values()) / whole)
    assert max(shares) <= 1.01
    assert statistics.median(shares) > 0.9


def test_the_small_model_is_what_the_formula_counts(bench, found):
    assert found["trainable_parameters"] == 2 * bench.layer_weights(bench.SMALL, lora=True)


def test_the_large_shape_is_qwen_72b(bench):
    """Qwen2.5-72B has 72.7 B parameters, and a LoRA of rank 16 on all its linear layers 210,534,400."""
    sizes = bench.LARGE
    assert 80 * bench.layer_weights(sizes, lora=True) == 210_534_400
    whole = 80 * bench.layer_weights(sizes) + 2 * sizes["hidden_size"] * sizes["vocab_size"]
    assert round(whole / 1e9, 1) == 72.7


@pytest.mark.parametrize(("contender", "expected"), [("stock", 43136), ("ours_cold", 32312), ("ours_warm", 25736)])
def test_flops_by_hand(bench, contender, expected):
    """One layer, hidden 2, inner 3, vocabulary 5, prompt 2, completions 2 and 2.

    Base weights 4 · 4 + 3 · 6 = 34, LoRA weights 16 · (4 · 4 + 3 · 5) = 496.
    Stock: 8 tokens, 2 · (1+2+3+4) = 20 attended: 8 · 34 · 8 + 8 · 496 · 10 + 8 · 20 · 5 + 8 · 10 · 6.
    Ours: 6 tokens, 10 + 3 + 4 = 17 attended, 4 scored: 6 · 34 · 8 + 6 · 496 · 10 + 8 · 17 · 5 + 4 · 10 · 6, and warm
    6 · 34 · 6 + 6 · 496 · 8 + 8 · 17 · 4 + 4 · 10 · 4.
    """
    sizes = dict(zip(bench.SIZES, (2, 3, 1, 1, 1, 5), strict=True))
    assert bench.step_flops(sizes, bench.Shape(4, 50), contender) == expected


@pytest.mark.parametrize("broken", ["ours_cold", "stock"])
def test_a_contender_out_of_memory_is_recorded_and_the_others_run(bench, tmp_path, monkeypatch, broken):
    def fail(*_):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(bench.Bench, broken, fail)
    (one,) = run(bench, tmp_path, "--tokens", "32", "--prompt", "50")["shapes"]
    contenders = one["contenders"]
    assert contenders.pop(broken) == {"out_of_memory": True}
    assert all(figures["pairs_per_second"] > 0 for figures in contenders.values())
    assert (contenders["ours_warm"]["times_stock"] is None) == (broken == "stock")


def test_shapes_that_no_longer_fit_in_the_time_are_named(bench, tmp_path):
    made = run(bench, tmp_path, "--minutes", "0", "--tokens", "32", "--prompt", "50", "30")
    assert made["shapes"] == []
    assert made["left_out"] == ["32 tokens, 50 % prompt", "32 tokens, 30 % prompt"]


def test_nf4_layers_are_quantised_one_by_one(bench, tmp_path):
    pytest.importorskip("bitsandbytes")
    made = run(bench, tmp_path, "--nf4", "--tokens", "32", "--prompt", "50")
    assert made["dequantisation"]["ms"] > 0
    if not torch.cuda.is_available():
        assert_agree(made["shapes"][0]["first_step"])
