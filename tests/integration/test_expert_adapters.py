"""Whole runs on the parameters of experts: from an SFT adapter, resumed, merged, and counted by the plan."""

import functools
import math

import pytest
import torch
import yaml
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_plugin.config import ReferenceConfig
from dpo_plugin.errors import AdapterError, CheckpointError, ConfigError
from dpo_plugin.host.settings import read_settings
from dpo_plugin.host.yaml_keys import typed
from dpo_plugin.model.adapters import REFERENCE, adapter_tensors
from dpo_plugin.plan.activations import PlannedModel
from dpo_plugin.plan.inputs import adapter_configs, model_config
from tests.support import forked, host, tiny
from tests.support.four_bit_experts import quantise_on_cpu
from tests.support.tiny import EXPERTS, dpo_config

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
    quantise_on_cpu(monkeypatch.setattr)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def dequantised(dense, quantised):
    """The base with the values of its 4-bit weights, for PEFT alone."""
    kept = {name.replace(".base_layer", ""): module for name, module in quantised.named_modules()}
    for name, parameter in dense.named_parameters():
        path, _, last = name.rpartition(".")
        module = kept[path]
        if isinstance(module, Linear4bit):
            parameter.data = dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif hasattr(module, "parametrizations"):
            parameter.data = getattr(module, last).data
    return dense


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


FRESH = {"lora_model_dir": None, "lora_target_modules": None, "lora_target_parameters": None}


@pytest.mark.parametrize(
    ("asked", "trains"),
    [
        ({}, False),
        ({**FRESH, "lora_target_linear": True}, False),
        ({**FRESH, "lora_target_parameters": ["mlp.gate.weight"]}, True),
        ({**FRESH, "lora_target_modules": MODULES, "lora_modules_to_save": ["gate"]}, True),
    ],
)
def test_routers_are_trained_only_if_they_are_asked_for(config, moe_dir, tmp_path, asked, trains):
    """Without, both adapters have the base's; whatever is asked for, the base's own stay as they are."""
    model = host.train(config(**asked), tmp_path).trainer.model
    adapters = {name for name, _ in model.adapter_parameters()}
    routers = {name for name in adapters if ".mlp.gate." in name}
    assert bool(routers) == trains
    assert routers <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    base = {name: value for name, value in load_file(moe_dir / "model.safetensors").items() if ".mlp.gate." in name}
    wrapped = ("base_model.model.", "base_layer.", "original_module.")
    for name, value in model.named_parameters():
        own = functools.reduce(lambda left, part: left.replace(part, ""), wrapped, name)
        if name not in adapters and own in base:
            assert torch.equal(value, base.pop(own))
    assert not base


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
    dense = dequantised(AutoModelForCausalLM.from_pretrained(moe_dir), model.get_base_model())
    alone = PeftModel.from_pretrained(dense, str(run.output_dir))
    result = alone.load_adapter(str(run.output_dir), "again")
    assert not result.missing_keys + result.unexpected_keys
    torch.testing.assert_close(logits(alone), logits(model), rtol=0, atol=1e-5)
    resume = config("whole", **saves, resume_from_checkpoint=str(run.output_dir / "checkpoint-2"))
    resumed = host.train(resume, tmp_path / "b")
    assert all(torch.equal(value, saved[key]) for key, value in adapter_file(resumed).items())
    with pytest.raises(CheckpointError, match="was trained on the base model .*: weights, quantisation"):
        host.train({**resume, "quantize_moe_experts": False}, tmp_path / "c")


@pytest.mark.parametrize(("kind", "more"), [*((kind, {}) for kind in tiny.MOE), ("qwen3_moe", FOUR_BITS)])
def test_merge_lora_merges_what_was_trained(tmp_path, kind, more):
    """The host alone leaves the experts out of it, with a warning: 0.19 for both kinds, 0.21 for Mixtral."""
    base_dir = tiny.save_moe(kind, tmp_path / "base")
    settings = {"target_modules": MODULES, "target_parameters": EXPERTS}
    trained = tiny.save_adapter(base_dir, tmp_path / "out", **settings)
    file = tmp_path / "config.yaml"
    file.write_text(
        yaml.safe_dump(dpo_config(base_dir, trained, lora_target_modules=MODULES, **more)), encoding="utf-8"
    )
    done = forked.run(["axolotl", "merge-lora", str(file)])
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


def test_an_adapter_for_another_number_of_experts_is_refused_before_weights_are_read(config, moe_dir, tmp_path):
    """Of the base there is its config.json alone."""
    eight = tmp_path / "eight"
    base = tiny.moe_config("qwen3_moe")
    base.num_experts = 8
    base.save_pretrained(eight)
    shapes = r"is on 4 experts: .*lora_A.weight is \(32, 64\), of rank 8, where 8 experts make it \(64, 64\)"
    with pytest.raises(
        AdapterError, match=f"`lora_model_dir: .*{shapes}.*`num_experts: 8`.*Write: base_model: {moe_dir}$"
    ):
        host.train(config(base_model=str(eight)), tmp_path / "a")
    attention = tiny.save_adapter(moe_dir, tmp_path / "attention", target_modules=MODULES)
    adapters = {"lora_model_dir": str(attention), "lora_target_parameters": None}
    reference = {"reference": {"adapter_dir": config()["lora_model_dir"]}}
    with pytest.raises(AdapterError, match=rf"`dpo_plugin.reference.adapter_dir: .*{shapes}"):
        host.train(config(base_model=str(eight), dpo_plugin=reference, **adapters), tmp_path / "b")


def test_log_probs_of_experts_in_four_bits_are_cached_apart(config):
    four = {"adapter": "qlora", "load_in_4bit": True}
    one, other = (read_settings(typed(config(**four, quantize_moe_experts=on))).numerics for on in (False, True))
    assert one != other
