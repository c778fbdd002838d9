"""Each reference strategy alone: what it needs, which model and which adapter it runs, and what it says of itself."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM

from dpo_plugin.config import ReferenceConfig
from dpo_plugin.errors import ConfigError
from dpo_plugin.model.adapter_config import AdapterFolder
from dpo_plugin.model.adapters import REFERENCE, attach
from dpo_plugin.model.references import (
    AdapterReference,
    BaseReference,
    ModelReference,
    NoReference,
    ReferenceChoice,
    ReferenceStrategy,
    strategy_name,
)
from dpo_plugin.types import CompletionLogps
from tests.support import tiny

BATCH = SimpleNamespace(num_pairs=3, input_ids=torch.zeros(1, 3, dtype=torch.long))
FRESH = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def with_adapters(base_dir, policy=FRESH, reference=None):
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    folders = [AdapterFolder.open(one, "k") if isinstance(one, Path) else one for one in (policy, reference)]
    return attach(base, *folders)


def logps_of(*sums):
    """Chosen of all pairs, then rejected of all pairs."""
    values = torch.tensor(sums, requires_grad=True)
    return CompletionLogps(values, torch.ones(len(sums)), values)


# ── what a strategy needs ──


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            ModelReference,
            "the reference strategy ModelReference needs full fine-tuning, where the host loads a second model. "
            "Write: dpo_plugin: {reference: {strategy: adapter}}",
        ),
        (BaseReference, "the reference strategy BaseReference needs an adapter to switch off. Write: adapter: lora"),
        (
            AdapterReference,
            "the reference strategy AdapterReference needs an adapter to switch off. Write: adapter: lora",
        ),
    ],
)
def test_full_fine_tuning_without_a_second_model_has_no_reference(strategy, message):
    with pytest.raises(ConfigError) as refused:
        strategy(nn.Linear(2, 2))
    assert str(refused.value) == message


def test_a_lora_without_a_second_adapter_is_no_adapter_reference(base_dir):
    with pytest.raises(ConfigError) as refused:
        AdapterReference(with_adapters(base_dir))
    assert str(refused.value) == (
        "the reference strategy AdapterReference needs a reference adapter. Write: lora_model_dir: <SFT adapter folder>"
    )


def test_what_was_given_is_kept(base_dir):
    policy, second, options = with_adapters(base_dir), nn.Linear(2, 2), ReferenceConfig(strategy="none")
    made = NoReference(policy, second, options)
    assert (made.policy, made.ref_model, made.options) == (policy, second, options)
    assert NoReference(policy).options == ReferenceConfig()


def test_the_policy_values_are_its_parameters_unless_an_engine_gives_others(base_dir, sft_dir):
    policy = with_adapters(base_dir, sft_dir, sft_dir)
    values, own = AdapterReference(policy).policy_values(), dict(policy.policy_parameters())
    assert values.keys() == own.keys()
    assert len(own) == 2 * 7 * 4, "A and B of seven projections in four layers, none of the reference"
    assert all(torch.equal(value, own[name]) and not value.requires_grad for name, value in values.items())


# ── what it runs ──


def test_the_engines_root_runs_with_the_reference_adapter_in_place(base_dir, sft_dir, tmp_path):
    """Against the reference adapter alone on the base; the root is what DDP, DeepSpeed or FSDP made of the policy."""
    policy = with_adapters(base_dir, tiny.save_adapter(base_dir, tmp_path, seed=5), sft_dir)
    root, ids, ran = object(), torch.arange(5, 15)[None], []

    def forward(model, batch):
        ran.append((model, batch))
        torch.testing.assert_close(policy(ids).logits, alone, rtol=0, atol=0)
        return logps_of(-1.0, -2.0, -3.0, -4.0, -5.0, -6.0)

    before, alone = (model(ids).logits for model in (policy, with_adapters(base_dir, sft_dir)))
    assert not torch.equal(before, alone)
    found = AdapterReference(policy).logps(root, BATCH, forward)
    assert ran == [(root, BATCH)]
    assert found.tolist() == [[-1.0, -4.0], [-2.0, -5.0], [-3.0, -6.0]]
    assert not found.requires_grad
    torch.testing.assert_close(policy(ids).logits, before, rtol=0, atol=0)


def test_the_base_runs_with_the_adapters_off(base_dir, sft_dir):
    policy = with_adapters(base_dir, sft_dir)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad(), BaseReference(policy).active(policy) as model:
        found = model(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(base_dir)(ids).logits
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
    assert not torch.equal(policy(ids).logits, plain)


def test_a_second_model_runs_itself():
    policy, second, root = nn.Linear(2, 2), nn.Linear(2, 2), object()
    strategy = ModelReference(policy, second)
    found = strategy.run(root, BATCH, lambda model, batch: (model, batch))
    assert found == (second, BATCH)
    assert strategy.equals_policy_at_start()


def test_no_reference_is_0_for_every_completion_and_runs_nothing():
    strategy, never = NoReference(nn.Linear(2, 2)), lambda *_: pytest.fail("ran")
    assert strategy.logps(None, BATCH, never).tolist() == [[0.0, 0.0]] * 3
    elsewhere = SimpleNamespace(num_pairs=3, input_ids=BATCH.input_ids.to("meta"))
    found = strategy.run(None, elsewhere, never)
    assert [(value.shape, value.device.type) for value in (found.sums, found.tokens, found.mean_logits)] == [
        ((6,), "meta")
    ] * 3


def test_one_that_defines_neither_model_nor_run_is_told_so():
    class Forgotten(ReferenceStrategy):
        pass

    with pytest.raises(AssertionError) as raised:
        Forgotten(nn.Linear(2, 2)).run(object(), BATCH, lambda *_: None)
    assert str(raised.value).startswith("Forgotten defines neither active nor run")


# ── what it says of itself ──


def test_the_policy_is_the_reference_at_the_start_where_their_tensors_are(base_dir, sft_dir, tmp_path):
    same = with_adapters(base_dir, sft_dir, sft_dir)
    different = with_adapters(base_dir, tiny.save_adapter(base_dir, tmp_path, seed=5), sft_dir)
    assert AdapterReference(same).equals_policy_at_start() is True
    assert AdapterReference(different).equals_policy_at_start() is False
    assert AdapterReference(same).identity() == AdapterReference(different).identity()
    assert AdapterReference(different).identity() == f"sha256:{different.digests[REFERENCE]}"
    assert BaseReference(with_adapters(base_dir)).equals_policy_at_start() is True
    assert BaseReference(with_adapters(base_dir, sft_dir)).equals_policy_at_start() is False
    assert NoReference(same).equals_policy_at_start() is False
    assert NoReference(same).identity() == "NoReference"


def test_what_may_be_cached_runs_a_model_and_does_not_move():
    class Moving(AdapterReference):
        moves = True

    cacheable = [one.cacheable() for one in (AdapterReference, BaseReference, ModelReference, NoReference, Moving)]
    assert cacheable == [True, True, True, False, False]
    assert NoReference(nn.Linear(2, 2)).state() == {}


@pytest.mark.parametrize(
    ("cfg", "section", "name"),
    [
        ({}, {}, "model"),
        ({"lora_model_dir": "sft"}, {}, "model"),
        ({"adapter": "lora"}, {}, "base"),
        ({"adapter": "qlora", "lora_model_dir": "sft"}, {}, "adapter"),
        ({"adapter": "lora"}, {"adapter_dir": "sft"}, "adapter"),
        ({"adapter": "lora", "lora_model_dir": "sft"}, {"strategy": "ema"}, "ema"),
    ],
)
def test_the_name_is_the_one_given_or_follows_from_what_there_is(cfg, section, name):
    assert strategy_name(cfg, ReferenceConfig(**section)) == name


def test_another_adapter_than_lora_is_refused():
    with pytest.raises(ConfigError) as refused:
        strategy_name({"adapter": "llama-adapter"}, ReferenceConfig(strategy="none"))
    assert str(refused.value) == (
        "`adapter: llama-adapter`: Only LoRA is supported: policy and reference share one base. Write: adapter: lora"
    )


def test_a_choice_is_written_with_its_folder(sft_dir):
    folder = AdapterFolder.open(sft_dir, "lora_model_dir")
    assert str(ReferenceChoice("adapter", AdapterReference, folder)) == f"adapter {sft_dir}"
    assert str(ReferenceChoice("none", NoReference)) == "none"
