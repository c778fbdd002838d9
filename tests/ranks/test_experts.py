"""Two adapters on attention and experts of a mixture, on two ranks: one process's curve, adapter and reference.

Names end in the base's precision: under ``nf4e`` experts are in 4 bits, too.
"""

import json
import math

import pytest
import torch
from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights
from transformers import AutoModelForCausalLM

from tests.ranks.shipped import BF16, config, curve
from tests.support import tiny
from tests.support.cpu_ranks import launch

STEPS = 4
MODULES = ["q_proj", "v_proj"]
LAYERS = {"fsdp_config": {"transformer_layer_cls_to_wrap": "Qwen3MoeDecoderLayer"}}
FOUR_BITS = {"quantize_moe_experts": True}
ENGINES = {
    "zero3-bf16": ("zero3-nf4", BF16),
    "zero3-nf4e": ("zero3-nf4", FOUR_BITS),
    "fsdp2-bf16": ("fsdp2-bf16", LAYERS),
    "fsdp2-nf4e": ("fsdp2-nf4", {**LAYERS, **FOUR_BITS}),
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return tiny.save_moe("qwen3_moe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def sft(moe, tmp_path_factory):
    shape = {"r": 16, "lora_alpha": 16, "target_modules": MODULES, "target_parameters": tiny.EXPERTS}
    return tiny.save_adapter(moe, tmp_path_factory.mktemp("sft"), **shape)


def train(name, moe, sft, folder, ranks=2, **settings):
    """A shipped recipe on the mixture; of its ZeRO-3, which would keep so small a model whole, all is partitioned."""
    recipe, engine = ENGINES[name]
    lora = {"lora_dropout": 0.0, "lora_target_modules": MODULES, "lora_target_parameters": tiny.EXPERTS}
    steps = {"max_steps": STEPS, "eval_steps": STEPS, "save_steps": STEPS // 2}
    cache = {"dpo_plugin": {"reference": {"cache": False}}}
    cfg = config(recipe, moe, sft, folder, **{**engine, **lora, **steps, **cache, **settings})
    if cfg.get("deepspeed"):
        cfg["deepspeed"] = json.loads((tiny.ROOT / cfg["deepspeed"]).read_text(encoding="utf-8"))
        cfg["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    quantises = ("tests.support.four_bit_experts.FourBitExperts",) if cfg.get("quantize_moe_experts") else ()
    run = launch(cfg, folder, ranks, more_plugins=quantises)
    assert run.returncode == 0, run.error()
    return run


@pytest.fixture(scope="module")
def alone(moe, sft, tmp_path_factory):
    """One process with the same global batch, in each precision."""
    found = {}

    def run(name):
        precision = name.split("-")[1]
        if precision not in found:
            engine = {"deepspeed": None, "micro_batch_size": 4, "save_strategy": "no", "save_steps": None}
            folder = tmp_path_factory.mktemp(f"alone-{precision}")
            found[precision] = train(f"zero3-{precision}", moe, sft, folder, ranks=1, **engine)
        return found[precision]

    return run


@pytest.fixture(scope="module", params=ENGINES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def run(name, moe, sft, tmp_path_factory):
    return train(name, moe, sft, tmp_path_factory.mktemp(name))


def test_two_ranks_print_the_curve_of_one_process(name, run, alone):
    assert run.lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert run.lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    expected = curve(alone(name).lines)
    assert len(expected) == len(run.lines) == STEPS
    assert expected[-1, 1] > 0.01, "the policy must have moved for the curve to mean something"
    difference = (curve(run.lines) - expected).abs().amax(0)
    print(f"\n{name}: max difference of loss {difference[0]:.1e}, of margin {difference[1]:.1e}")
    assert difference.max() <= 2e-3
    assert run.evaluations[-1]["eval_loss"] == pytest.approx(alone(name).evaluations[-1]["eval_loss"], abs=2e-3)


def test_adapters_on_experts_are_trained_in_fp32_and_routers_are_not(run, sft):
    named = {name.removeprefix("base_model.model.").replace(".default.", ".") for name in run.facts["optimised"]}
    assert named == {key.removeprefix("base_model.model.") for key in load_peft_weights(str(sft), device="cpu")}
    assert run.facts["masters"] == ["torch.float32"]


def test_the_reference_is_the_sft_adapter_to_the_end(run, sft):
    left, start = run.recorded("reference_at_end"), load_peft_weights(str(sft), device="cpu")
    assert left.keys() == start.keys()
    assert all(torch.equal(left[key], value.to(left[key].dtype)) for key, value in start.items())


def test_what_is_saved_loads_into_peft_with_no_key_missing(run, moe, sft):
    saved, start = (load_peft_weights(str(folder), device="cpu") for folder in (run.output_dir, sft))
    shapes = [{key: (value.shape, value.dtype) for key, value in one.items()} for one in (saved, start)]
    assert shapes[0] == shapes[1]
    assert not any(torch.equal(saved[key], start[key]) for key in saved)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(moe), str(run.output_dir))
    result = model.load_adapter(str(run.output_dir), "again")
    assert not result.missing_keys
    assert not result.unexpected_keys
    loaded = {key: value for key, value in model.state_dict().items() if ".default." in key}
    assert len(loaded) == len(saved)
    assert all(torch.equal(loaded[key.replace(".weight", ".default.weight")], value) for key, value in saved.items())


@pytest.mark.parametrize("name", ["zero3-bf16", "fsdp2-bf16"], indirect=True)
def test_a_resumed_run_goes_on_along_the_curve(name, run, alone, moe, sft, tmp_path):
    settings = {
        "resume_from_checkpoint": str(run.output_dir / f"checkpoint-{STEPS // 2}"),
        "save_strategy": "no",
        "save_steps": None,
    }
    resumed = train(name, moe, sft, tmp_path, **settings)
    assert [line["step"] for line in resumed.lines] == list(range(1, STEPS + 1))
    assert (curve(resumed.lines) - curve(alone(name).lines)).abs().max() <= 2e-3
