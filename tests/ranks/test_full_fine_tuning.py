"""Full fine-tuning against a second model prints one curve on one process and on every engine.

In bf16 it is so because the optimizer updates fp32 master weights on each, as DeepSpeed always does. axolotl 0.19 asks for
NCCL where one process runs DeepSpeed, so the curve to meet is that of a process without an engine.
"""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks.shipped import config, curve
from tests.support import host
from tests.support.cpu_ranks import allow_bf16, launch

STEPS = 4
WITHOUT = (
    *("adapter", "lora_model_dir", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    *("load_in_4bit", "bnb_config_kwargs", "eval_strategy", "eval_steps", "test_datasets", "save_steps"),
)


def zero(stage, **precision):
    auto = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")
    return {"deepspeed": {"zero_optimization": {"stage": stage}, **precision, **dict.fromkeys(auto, "auto")}}


def full(recipe, base_dir, folder, ranks, **engine):
    settings = {
        **dict.fromkeys(WITHOUT),
        "save_strategy": "no",
        "max_steps": STEPS,
        "learning_rate": 2e-5,
        "micro_batch_size": 4 // ranks,
        "dpo_plugin": {"reference": {"cache": False}},
        **engine,
    }
    return config(recipe, base_dir, base_dir, folder, **settings)


def train(recipe, base_dir, folder, ranks, **engine):
    run = launch(full(recipe, base_dir, folder, ranks, **engine), folder, ranks=ranks)
    assert run.returncode == 0, run.error()
    return run


BF16 = {"bf16": {"enabled": True}}
ENGINES = {
    "ddp": ("ddp-nf4", {}),
    "fsdp2": ("fsdp2-bf16", {}),
    "zero2": ("zero3-nf4", zero(2, **BF16)),
    "zero3": ("zero3-nf4", zero(3, **BF16)),
}


@pytest.fixture(scope="module")
def alone(base_dir, tmp_path_factory):
    """The curve of one process without an engine, by precision."""
    found = {}

    def run(bf16):
        if bf16 not in found:
            folder = tmp_path_factory.mktemp("one")
            with pytest.MonkeyPatch.context() as patch:
                if bf16:
                    allow_bf16(patch.setattr)
                found[bf16] = curve(host.train(full("ddp-nf4", base_dir, folder, ranks=1, bf16=bf16), folder).lines)
        return found[bf16]

    return run


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_print_the_curve_of_one_process(engine, alone, base_dir, tmp_path):
    recipe, settings = ENGINES[engine]
    run = train(recipe, base_dir, tmp_path / "run", ranks=2, **settings)
    assert_same_curve(run, alone(bf16=True), 2e-3)
    assert run.lines[-1]["weights/changed"] > 0.99


@pytest.mark.parametrize(
    ("recipe", "engine"),
    [ENGINES["fsdp2"], ("zero3-nf4", zero(3))],
    ids=["fsdp2", "zero3"],
)
def test_in_fp32_a_sharded_model_prints_the_curve_of_one_process(recipe, engine, alone, base_dir, tmp_path):
    run = train(recipe, base_dir, tmp_path / "run", ranks=2, bf16=False, **engine)
    assert_same_curve(run, alone(bf16=False), 1e-5)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_half_the_steps_and_resume_and_the_other_half_are_all_bit_by_bit(engine, base_dir, tmp_path):
    recipe, settings = ENGINES[engine]
    saves = {**settings, "save_strategy": "steps", "save_steps": STEPS // 2}
    whole = train(recipe, base_dir, tmp_path / "whole", ranks=2, **saves)
    half = tmp_path / f"half/out/checkpoint-{STEPS // 2}"
    shutil.copytree(whole.output_dir / half.name, half)
    resumed = train(recipe, base_dir, tmp_path / "half", ranks=2, **saves, auto_resume_from_checkpoints=True)
    expected, found = (load_file(run.output_dir / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert json.loads((resumed.output_dir / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(curve(resumed.lines), curve(whole.lines))


def assert_same_curve(run, expected, tolerance):
    assert expected[0, 0] == pytest.approx(math.log(2), abs=1e-4)
    assert run.lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert len(run.lines) == STEPS
    assert expected[-1, 1] > 0.02, "the policy must have moved for the curve to mean something"
    difference = (curve(run.lines) - expected).abs().amax(0)
    print(f"\nmax difference of loss {difference[0]:.1e}, of margin {difference[1]:.1e}")
    assert difference.max() <= tolerance
