"""Norms of what an adapter has travelled, against sums by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_plugin.host import travel
from dpo_plugin.host.travel import Travel
from dpo_plugin.model.adapters import AdapterFolder, attach
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
    travelled = Travel(model)
    assert travelled.figures(model, alone, 0) == {"adapter/distance": 0.0}
    shift(model, 0.5)
    found = travelled.figures(model, alone, 0)
    assert found["adapter/distance"] == pytest.approx(0.5 * weights(model) ** 0.5, rel=1e-5)
    assert found["adapter/update_norm"] == pytest.approx(found["adapter/distance"], rel=1e-5)
    shift(model, 0.25)
    found = travelled.figures(model, alone, 0)
    assert found["adapter/distance"] == pytest.approx(0.75 * weights(model) ** 0.5, rel=1e-5)
    assert found["adapter/update_norm"] == pytest.approx(0.25 * weights(model) ** 0.5, rel=1e-5)


def test_weights_that_all_ranks_have_whole_count_once(model):
    travelled = Travel(model)
    shift(model, 0.5)
    assert travelled.figures(model, alone, 1) == {"adapter/distance": 0.0}


def test_a_sample_of_a_large_adapter_stands_for_all(model, monkeypatch):
    monkeypatch.setattr(travel, "SAMPLED", 1000)
    travelled = Travel(model)
    travelled.figures(model, alone, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, parameter in model.policy_parameters():
            parameter += torch.randn_like(parameter)
    found = travelled.figures(model, alone, 0)
    assert found["adapter/distance"] == pytest.approx(weights(model) ** 0.5, rel=0.1)
    assert found["adapter/update_norm"] == pytest.approx(found["adapter/distance"], rel=1e-5)


def test_a_reference_that_moves_is_looked_at_again(model):
    fixed, moving = Travel(model), Travel(model, moving=True)
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
        travelled = Travel(model)
        assert travelled.figures(model, alone, 0) == {}
        shift(model, 0.5)
        assert list(travelled.figures(model, alone, 0)) == ["adapter/update_norm"]
