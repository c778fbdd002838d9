"""How far trained weights have moved, against sums by hand, and the share of values that move."""

import types

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_plugin.health.checks import CHECKS
from dpo_plugin.health.history import History
from dpo_plugin.metrics import adapter_norms as module
from dpo_plugin.metrics.adapter_norms import AdapterNorms
from dpo_plugin.model.adapter_config import AdapterFolder
from dpo_plugin.model.adapters import attach
from dpo_plugin.types import RunFacts
from tests.support import tiny


@pytest.fixture
def model(base_dir, sft_dir):
    adapter = AdapterFolder.open(str(sft_dir), "lora_model_dir")
    return attach(AutoModelForCausalLM.from_pretrained(base_dir), adapter, adapter)


def shift(model, by):
    with torch.no_grad():
        for _, parameter in model.policy_parameters():
            parameter += by


def alone(values):
    return values


def weights(model):
    return sum(parameter.numel() for _, parameter in model.policy_parameters())


def test_distance_and_update(model):
    adapter_norms = AdapterNorms(model)
    assert adapter_norms.figures(model, alone, 0) == {"adapter/distance": 0.0}
    shift(model, 0.5)
    found = adapter_norms.figures(model, alone, 0)
    assert found["adapter/distance"] == pytest.approx(0.5 * weights(model) ** 0.5, rel=1e-5)
    assert found["adapter/update_norm"] == pytest.approx(found["adapter/distance"], rel=1e-5)
    shift(model, 0.25)
    found = adapter_norms.figures(model, alone, 0)
    assert found["adapter/distance"] == pytest.approx(0.75 * weights(model) ** 0.5, rel=1e-5)
    assert found["adapter/update_norm"] == pytest.approx(0.25 * weights(model) ** 0.5, rel=1e-5)


def test_weights_that_all_ranks_have_whole_count_once(model):
    adapter_norms = AdapterNorms(model)
    shift(model, 0.5)
    assert adapter_norms.figures(model, alone, 1) == {"adapter/distance": 0.0}


def test_a_sample_of_a_large_adapter_stands_for_all(model, monkeypatch):
    monkeypatch.setattr(module, "SAMPLED", 1000)
    adapter_norms = AdapterNorms(model)
    adapter_norms.figures(model, alone, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, parameter in model.policy_parameters():
            parameter += torch.randn_like(parameter)
    found = adapter_norms.figures(model, alone, 0)
    assert found["adapter/distance"] == pytest.approx(weights(model) ** 0.5, rel=0.1)
    assert found["adapter/update_norm"] == pytest.approx(found["adapter/distance"], rel=1e-5)


def test_a_reference_that_moves_is_looked_at_again(model):
    fixed, moving = AdapterNorms(model), AdapterNorms(model, moving=True)
    shift(model, 0.5)
    with torch.no_grad():
        for name, parameter in model.adapter_parameters():
            if ".reference" in name:
                parameter += 0.5
    assert fixed.figures(model, alone, 0)["adapter/distance"] > 1
    assert moving.figures(model, alone, 0)["adapter/distance"] == 0


def test_without_a_reference_adapter_of_its_shape_there_is_no_distance(base_dir, sft_dir, tmp_path):
    policy = AdapterFolder.open(str(sft_dir), "lora_model_dir")
    other = AdapterFolder.open(str(tiny.save_adapter(base_dir, tmp_path, r=4)), "reference.adapter_dir")
    for reference in (None, other):
        model = attach(AutoModelForCausalLM.from_pretrained(base_dir), policy, reference)
        adapter_norms = AdapterNorms(model)
        assert adapter_norms.figures(model, alone, 0) == {}
        shift(model, 0.5)
        assert list(adapter_norms.figures(model, alone, 0)) == ["adapter/update_norm", "weights/changed"]


def fine_tuned(base_dir, dtype, rate, steps=12):
    """The model after some AdamW steps on random tokens, and the log lines of what moved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype)
    adapter_norms, optimizer = AdapterNorms(model), torch.optim.AdamW(model.parameters(), lr=rate)
    assert adapter_norms.figures(model, alone, 0) == {}
    lines = []
    for step in range(1, steps + 1):
        ids = torch.randint(5, 250, (4, 32))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lines.append({"step": step, "learning_rate": rate, **adapter_norms.figures(model, alone, 0)})
    assert adapter_norms.dtype == dtype
    return lines


@pytest.mark.parametrize(
    ("dtype", "rate", "least", "most", "found"),
    [
        (torch.bfloat16, 5e-7, 0.0, 0.1, True),
        (torch.bfloat16, 1e-3, 0.95, 1.0, False),
        (torch.float32, 5e-7, 0.95, 1.0, False),
        (torch.float32, 1e-10, 0.0, 0.4, True),
    ],
)
def test_updates_that_the_weights_dtype_rounds_away_are_found(base_dir, dtype, rate, least, most, found):
    lines = fine_tuned(base_dir, dtype, rate)
    assert least <= lines[-1]["weights/changed"] <= most
    history = History(RunFacts(adapter_dtype=str(dtype), trainable_share=1.0))
    for line in lines:
        history.add(line)
    finding = CHECKS["learning_rate_below_precision"](history)
    assert bool(finding) == found
    write = "dpo_plugin: {compute: {master_weights: true}}" if dtype == torch.bfloat16 else "learning_rate: 1e-09"
    assert finding is None or finding.advice.endswith(f"Write: {write}")


def test_rows_of_tokens_that_no_batch_holds_do_not_count(base_dir):
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    embedding = model.get_input_embeddings().weight
    adapter_norms = AdapterNorms(model)
    adapter_norms.figures(model, alone, 0)
    with torch.no_grad():
        embedding[:3] += 1
    assert adapter_norms.figures(model, alone, 0) == {"weights/changed": 0.0}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter is not embedding:
                parameter += 1
    assert adapter_norms.figures(model, alone, 0) == {"weights/changed": 1.0}


def test_under_zero_1_and_2_the_fp32_part_of_this_rank_is_looked_at():
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.ones(6, dtype=torch.bfloat16))
    model.b = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    adapter_norms, masters = AdapterNorms(model), torch.ones(4)
    address = types.SimpleNamespace(start=2)
    model.a._hp_mapping = types.SimpleNamespace(hp_fragment=masters, lp_fragment_address=address)
    model.b._hp_mapping = None  # another rank has it
    adapter_norms.figures(model, alone, 1)
    masters[:3] += 1e-6  # bf16 cannot tell them from 1
    assert adapter_norms.figures(model, alone, 1) == {"weights/changed": 0.75}
    assert adapter_norms.dtype == torch.float32
