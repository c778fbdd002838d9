"""Full fine-tuning against a second model starts on every engine, along the curve of one process.

In fp32 it is one curve for all. In 16 bits that process updates weights of the same precision: 16 bits under FSDP2, 16 bits but
embeddings under DDP. Under DeepSpeed it is fp32 behind 16 bits, and as axolotl 0.19 asks for NCCL where one process runs
DeepSpeed, ZeRO-2 stands in for it.
"""

import math

import pytest

from tests.ranks.shipped import config, curve
from tests.support import host
from tests.support.cpu_ranks import launch

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
DDP, FSDP2 = ("ddp-nf4", {}), ("fsdp2-bf16", {})
ZERO2, ZERO3 = ("zero3-nf4", zero(2, **BF16)), ("zero3-nf4", zero(3, **BF16))


@pytest.mark.parametrize(
    ("engine", "like", "ranks"),
    [(DDP, DDP, 1), (FSDP2, FSDP2, 1), (ZERO3, ZERO2, 2)],
    ids=["ddp", "fsdp2", "zero3 and zero2"],
)
def test_two_ranks_print_the_curve_of_one_process(engine, like, ranks, base_dir, tmp_path):
    run = train(engine[0], base_dir, tmp_path / "run", ranks=2, **engine[1])
    expected = curve(train(like[0], base_dir, tmp_path / "like", ranks=ranks, **like[1]).lines)
    assert_same_curve(run, expected, 2e-3)


@pytest.fixture(scope="module")
def in_fp32(base_dir, tmp_path_factory):
    """The curve of one process without an engine."""
    folder = tmp_path_factory.mktemp("one")
    return curve(host.train(full("ddp-nf4", base_dir, folder, ranks=1, bf16=False), folder).lines)


@pytest.mark.parametrize(
    ("recipe", "engine"),
    [FSDP2, ("zero3-nf4", zero(3))],
    ids=["fsdp2", "zero3"],
)
def test_in_fp32_a_sharded_model_prints_the_curve_of_one_process(recipe, engine, in_fp32, base_dir, tmp_path):
    run = train(recipe, base_dir, tmp_path / "run", ranks=2, bf16=False, **engine)
    assert_same_curve(run, in_fp32, 1e-5)


def assert_same_curve(run, expected, tolerance):
    assert expected[0, 0] == pytest.approx(math.log(2), abs=1e-4)
    assert run.lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert len(run.lines) == STEPS
    assert expected[-1, 1] > 0.02, "the policy must have moved for the curve to mean something"
    difference = (curve(run.lines) - expected).abs().amax(0)
    print(f"\nmax difference of loss {difference[0]:.1e}, of margin {difference[1]:.1e}")
    assert difference.max() <= tolerance
