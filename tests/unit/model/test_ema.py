"""A reference that moves: in fp32 whatever an engine makes of the model, and only between adapters of one shape."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from dpo_plugin.config import ReferenceConfig
from dpo_plugin.errors import CheckpointError, ConfigError
from dpo_plugin.model.adapter_config import AdapterFolder
from dpo_plugin.model.adapters import attach
from dpo_plugin.model.ema import EmaReference
from tests.support import host, tiny


def ema(base_dir, policy, reference, alpha=0.01):
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    opened = AdapterFolder.open(policy, "lora_model_dir") if not isinstance(policy, LoraConfig) else policy
    model = attach(base, opened, AdapterFolder.open(reference, "adapter_dir"))
    return model, EmaReference(model, options=ReferenceConfig(strategy="ema", ema_alpha=alpha, ema_steps=2))


@pytest.mark.parametrize("engine", [torch.float32, torch.bfloat16])
def test_it_moves_in_fp32_from_fp32(base_dir, sft_dir, tmp_path, engine):
    """α 0.01 under an engine that casts the model to bf16 and keeps fp32 masters, as DeepSpeed does."""
    other = tiny.save_adapter(base_dir, tmp_path, seed=5)
    model, strategy = ema(base_dir, other, sft_dir)
    start = {name: value.clone() for name, value in strategy.state().items()}
    policy = {name: parameter.detach().clone() for name, parameter in model.policy_parameters()}
    model.to(engine)
    strategy.policy_values = lambda: policy
    strategy.after_step(1)
    assert all(torch.equal(value, start[name]) for name, value in strategy.state().items())
    strategy.after_step(2)
    for name, value in strategy.state().items():
        torch.testing.assert_close(value, 0.99 * start[name] + 0.01 * policy[name], rtol=0, atol=1e-7)
        used = dict(model.named_parameters())[name.replace(".default", ".reference")]
        assert used.dtype == engine
        assert torch.equal(used, value.to(engine))
    moved = sum((value != start[name]).sum().item() for name, value in strategy.state().items())
    assert moved > 0.99 * sum(value.numel() for value in start.values())


@pytest.mark.parametrize("engine", [torch.float32, torch.bfloat16])
def test_what_was_kept_comes_back_bit_by_bit(base_dir, sft_dir, tmp_path, engine):
    model, strategy = ema(base_dir, tiny.save_adapter(base_dir, tmp_path, seed=5), sft_dir, alpha=0.3)
    model.to(engine)
    strategy.after_step(2)
    kept = {name: value.clone() for name, value in strategy.state().items()}
    again, restored = ema(base_dir, tmp_path, sft_dir)
    again.to(engine)
    restored.load_state(kept)
    assert all(torch.equal(value, kept[name]) for name, value in restored.state().items())
    with pytest.raises(CheckpointError, match="other tensors"):
        restored.load_state(dict(list(kept.items())[1:]))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"r": 4}, "`r` is 8 in .* and 4 in "),
        ({"lora_alpha": 8}, "`lora_alpha` is 16 in .* and 8 in "),
        ({"target_modules": ["q_proj"]}, ""),
    ],
)
def test_adapters_of_another_shape_are_refused_at_the_start(base_dir, sft_dir, tmp_path, settings, found):
    other = tiny.save_adapter(base_dir, tmp_path, **settings)
    if "target_modules" not in settings:
        reference = {"strategy": "ema", "adapter_dir": str(other)}
        config = tiny.dpo_config(
            base_dir, tmp_path / "out", lora_model_dir=str(sft_dir), dpo_plugin={"reference": reference}
        )
        with pytest.raises(ConfigError, match=f"must have the same shape: {found}.*Write: adapter_dir"):
            host.load_config(config, tmp_path)
    with pytest.raises(ConfigError, match="must have the same shape: .* differs. Write: adapter_dir"):
        ema(base_dir, sft_dir, other)
    fresh = LoraConfig(r=8, lora_alpha=16, target_modules=tiny.PROJECTIONS, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="must have the same shape"):
        ema(base_dir, fresh, other)
