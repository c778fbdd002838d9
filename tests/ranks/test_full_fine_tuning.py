"""Full fine-tuning against a second model prints the curve of one process that updates weights of the same precision."""

import math

import pytest

from tests.ranks.shipped import config, curve
from tests.support.cpu_ranks import launch

STEPS = 4
WITHOUT = (
    *("adapter", "lora_model_dir", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    *("load_in_4bit", "bnb_config_kwargs", "eval_strategy", "eval_steps", "test_datasets", "save_steps"),
)


def zero(stage):
    auto = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")
    sections = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    return {"deepspeed": {**sections, **dict.fromkeys(auto, "auto")}}


def train(recipe, base_dir, folder, ranks, **engine):
    settings = {
        **dict.fromkeys(WITHOUT),
        "save_strategy": "no",
        "max_steps": STEPS,
        "learning_rate": 2e-5,
        "micro_batch_size": 4 // ranks,
        "dpo_plugin": {"reference": {"cache": False}},
        **engine,
    }
    run = launch(config(recipe, base_dir, base_dir, folder, **settings), folder, ranks=ranks)
    assert run.returncode == 0, run.error()
    return run


@pytest.fixture(scope="module")
def alone(base_dir, tmp_path_factory):
    """One process, which updates 16-bit weights as they are, or fp32 ones behind them under DeepSpeed."""
    found = {}

    def run(masters):
        if masters not in found:
            recipe, engine = ("zero3-nf4", zero(2)) if masters else ("ddp-nf4", {})
            found[masters] = curve(train(recipe, base_dir, tmp_path_factory.mktemp("alone"), ranks=1, **engine).lines)
        return found[masters]

    return run


@pytest.mark.parametrize(
    ("recipe", "engine", "masters"),
    [
        ("ddp-nf4", {}, False),
        ("fsdp2-bf16", {}, False),
        ("zero3-nf4", zero(2), True),
        ("zero3-nf4", zero(3), True),
    ],
    ids=["ddp", "fsdp2", "zero2", "zero3"],
)
def test_full_fine_tuning_prints_the_curve_of_one_process(recipe, engine, masters, base_dir, alone, tmp_path):
    run = train(recipe, base_dir, tmp_path, ranks=2, **engine)
    expected = alone(masters)
    assert run.lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert len(run.lines) == STEPS
    assert expected[-1, 1] > 0.02, "the policy must have moved for the curve to mean something"
    difference = (curve(run.lines) - expected).abs().amax(0)
    print(f"\nmax difference of loss {difference[0]:.1e}, of margin {difference[1]:.1e}")
    assert difference.max() <= 2e-3
