"""Whole runs on the parameters of experts: from an SFT adapter, resumed, merged, and counted by the plan."""

import math
import os
import subprocess

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_plugin.config import ReferenceConfig
from dpo_plugin.errors import ConfigError
from dpo_plugin.host.settings import read_settings
from dpo_plugin.host.yaml_keys import typed
from dpo_plugin.model.adapters import REFERENCE, adapter_tensors
from dpo_plugin.plan.activations import PlannedModel
from dpo_plugin.plan.inputs import adapter_configs, model_config
from tests.support import host, tiny
from tests.support.tiny import EXPERTS, ROOT, dpo_config

IDS = torch.arange(5, 45).reshape(2, 20)
MODULES = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory):
    return tiny.save_moe("qwen3_moe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def expert_sft_dir(moe_dir, tmp_path_factory):
    settings = {"target_modules": MODULES, "target_parameters": EXPERTS}
    return tiny.save_adapter(moe_dir, tmp_path_factory.mktemp("expert_sft"), **settings)


@pytest.fixture
def config(moe_dir, expert_sft_dir, tmp_path):
    """The YAML of SFT with the lines of DPO; the host patches PEFT's injection for ``lora_target_parameters``."""

    def write(output="out", **settings):
        lora = {
            "lora_target_modules": MODULES,
            "lora_target_parameters": EXPERTS,
            "lora_model_dir": str(expert_sft_dir),
        }
        return dpo_config(moe_dir, tmp_path / output, **{**lora, "save_strategy": "no", "save_steps": None, **settings})

    return write


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def adapter_file(run):
    return load_file(run.output_dir / "adapter_model.safetensors")


@pytest.mark.parametrize("strategy", ["adapter", "base", "ema", "none"])
def test_reference_strategies(config, expert_sft_dir, moe_dir, tmp_path, strategy):
    moves = {"ema_alpha": 0.25, "ema_steps": 4} if strategy == "ema" else {}
    run = host.train(config(dpo_plugin={"reference": {"strategy": strategy, **moves}}), tmp_path)
    first, sft, saved = run.lines[0], load_file(expert_sft_dir / "adapter_model.safetensors"), adapter_file(run)
    assert saved.keys() == sft.keys()
    assert all(not torch.equal(saved[key], sft[key]) for key in sft)
    if strategy in ("adapter", "ema"):
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        reference = adapter_tensors(run.trainer.model, REFERENCE)
        for key, value in sft.items():
            expected = value if strategy == "adapter" else 0.75 * value + 0.25 * saved[key]
            torch.testing.assert_close(reference[key], expected, rtol=0, atol=0 if strategy == "adapter" else 1e-7)
    else:
        assert first["rewards/chosen"] != 0
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(moe_dir), str(run.output_dir))
    assert not loaded.load_adapter(str(run.output_dir), "again").missing_keys
    torch.testing.assert_close(logits(loaded), logits(run.trainer.model), rtol=0, atol=1e-5)


def test_a_fresh_lora_on_experts_and_its_count_in_the_plan(config, tmp_path):
    settings = config(lora_model_dir=None, lora_target_modules=[])
    run = host.train({key: value for key, value in settings.items() if value is not None}, tmp_path)
    assert run.lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.trainer.reference.strategy.equals_policy_at_start()
    trained = sum(parameter.numel() for _, parameter in run.trainer.model.policy_parameters())
    planned = PlannedModel(model_config(settings), adapter_configs(settings, ReferenceConfig()), torch.float32)
    assert planned.sizes.trained == trained == 17_408  # 2 layers · 4 experts · 8 · ((64 + 96) + (48 + 64))


def test_resume_and_checkpointing_change_nothing(config, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = host.train(config("whole", **saves), tmp_path / "a")
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    again = host.train(config("again", max_steps=4, **checkpointing), tmp_path / "b")
    for one, other in zip(whole.lines, again.lines, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
    resumed = host.train(
        config("whole", **saves, resume_from_checkpoint=str(whole.output_dir / "checkpoint-2")), tmp_path / "c"
    )
    expected = adapter_file(whole)
    assert all(torch.equal(value, expected[key]) for key, value in adapter_file(resumed).items())


@pytest.mark.parametrize("kind", tiny.MOE)
def test_merge_lora_merges_what_was_trained(tmp_path, kind):
    """The host alone leaves the experts out of it, with a warning: 0.19 for both kinds, 0.21 for Mixtral."""
    base_dir = tiny.save_moe(kind, tmp_path / "base")
    settings = {"target_modules": MODULES, "target_parameters": EXPERTS}
    trained = tiny.save_adapter(base_dir, tmp_path / "out", **settings)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(dpo_config(base_dir, trained, lora_target_modules=MODULES)), encoding="utf-8")
    done = subprocess.run(
        ["axolotl", "merge-lora", str(file)],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    expected = dict(PeftModel.from_pretrained(base, str(trained)).merge_and_unload().named_parameters())
    for name, found in AutoModelForCausalLM.from_pretrained(trained / "merged").named_parameters():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-6)


def test_settings_that_the_config_alone_refuses(config, moe_dir, tmp_path):
    other = tiny.save_adapter(moe_dir, tmp_path / "other", target_modules=[], target_parameters=EXPERTS[:1])
    reference = {"reference": {"adapter_dir": str(other)}}
    with pytest.raises(ConfigError, match=r"adapter_dir: .*other` is on the parameters \[mlp.experts.gate_up_proj\]"):
        read_settings(typed(config(dpo_plugin=reference)))
    with pytest.raises(ConfigError, match=r"`lora_target_parameters.*Write: lora_target_parameters: \["):
        read_settings(typed(config(lora_target_parameters="mlp.experts.gate_up_proj")))
