"""Whole runs on the parameters of experts: from an SFT adapter, resumed, merged, and counted by the plan."""

import math
import os
import subprocess

import pytest
import torch
import yaml
from axolotl.loaders.model import ModelLoader
from axolotl.monkeypatch import moe_quant
from bitsandbytes.nn.parametrize import Bnb4bitParametrization, replace_parameter_4bit
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
def sft_of(moe_dir, expert_sft_dir, tmp_path):
    """The SFT adapter on experts, or one on attention alone."""
    return lambda on_experts: (
        expert_sft_dir if on_experts else tiny.save_adapter(moe_dir, tmp_path / "sft", target_modules=MODULES)
    )


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


@pytest.fixture
def four_bit_experts(monkeypatch):
    """Let ``quantize_moe_experts`` do on a CPU what it does on a GPU.

    The host quantises what it loads if that is on a GPU, and nothing elsewhere (axolotl 0.19 to 0.21,
    monkeypatch/moe_quant.py, ``_patched_set_param_for_module``); here the same is done once all is loaded.
    """
    load = ModelLoader._load_model_from_pretrained

    def load_in_four_bits(self, *args):
        self.model_kwargs["device_map"] = {"": "cpu"}  # GPU 0 otherwise
        return quantise_experts(load(self, *args))

    monkeypatch.setattr(ModelLoader, "_load_model_from_pretrained", load_in_four_bits)


def quantise_experts(model):
    for path, module in list(model.named_modules()):
        if path.endswith(".experts"):
            names = [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
            moe_quant._moe_load_state["expert_param_order"][path] = list(module._parameters)
            for name in names:
                replace_parameter_4bit(module, name, compress_statistics=True, quant_type="nf4")
    return model


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


FOUR_BITS = {"adapter": "qlora", "load_in_4bit": True, "quantize_moe_experts": True}


@pytest.mark.parametrize("on_experts", [True, False])
def test_experts_in_four_bits(config, sft_of, moe_dir, tmp_path, four_bit_experts, on_experts):
    sft = sft_of(on_experts)
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lora_model_dir": str(sft), **FOUR_BITS}
    saves |= {} if on_experts else {"lora_target_parameters": None}
    run = host.train(config("whole", **saves), tmp_path / "a")
    model = run.trainer.model
    quantised = [m for m in model.modules() if isinstance(m, Bnb4bitParametrization)]
    assert len(quantised) == 4  # two parameters in each of two layers
    assert run.lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    start, saved = load_file(sft / "adapter_model.safetensors"), adapter_file(run)
    assert saved.keys() == start.keys()
    assert not any(torch.equal(saved[key], start[key]) for key in start)
    reference = adapter_tensors(model, REFERENCE)
    assert all(torch.equal(reference[key], value) for key, value in start.items())
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(moe_dir), str(run.output_dir))
    result = plain.load_adapter(str(run.output_dir), "again")
    assert not result.missing_keys + result.unexpected_keys
    resumed = host.train(
        config("whole", **saves, resume_from_checkpoint=str(run.output_dir / "checkpoint-2")), tmp_path / "b"
    )
    assert all(torch.equal(value, saved[key]) for key, value in adapter_file(resumed).items())


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
