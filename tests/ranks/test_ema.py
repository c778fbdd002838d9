"""A reference that moves, under DeepSpeed on two real gloo ranks: in fp32 from fp32, and restored on resume."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks.shipped import BF16, config
from tests.support.cpu_ranks import launch

ALPHA = 0.01


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    zero2 = tmp_path_factory.mktemp("zero2") / "zero2.json"
    automatic = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"
    )
    zero2.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, **automatic}))
    ema = {"reference": {"strategy": "ema", "ema_alpha": ALPHA, "ema_steps": 1, "cache": False}}
    return {
        **BF16, "deepspeed": str(zero2), "dpo_plugin": ema, "max_steps": 3, "save_steps": 2, "learning_rate": 2e-3,
        "test_datasets": None, "eval_steps": None, "eval_strategy": "no", "gradient_accumulation_steps": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(base_dir, sft, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    done = launch(config("zero3-nf4", base_dir, sft, folder, **settings), folder)
    assert done.returncode == 0, done.error()
    return done


def test_a_resumed_run_has_the_reference_that_was_left(unbroken, base_dir, sft, settings, tmp_path):
    shutil.copytree(unbroken.output_dir / "checkpoint-2", tmp_path / "out/checkpoint-2")
    resumed = launch(
        config("zero3-nf4", base_dir, sft, tmp_path, **settings, auto_resume_from_checkpoints=True), tmp_path
    )
    assert resumed.returncode == 0, resumed.error()
    assert [line["step"] for line in resumed.lines] == [1, 2, 3]
    expected, found = (run.lines[-1] for run in (unbroken, resumed))
    print(f"\nloss of step 3: {expected['loss']:.6f} unbroken, {found['loss']:.6f} resumed")
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    assert found["rewards/margins"] == pytest.approx(expected["rewards/margins"], abs=1e-4)


def test_the_reference_moves_in_fp32_from_fp32(unbroken, sft):
    """After one update: reference = (1 − α) · start + α · policy, of which bf16 would round nearly all away."""
    start = load_file(sft / "adapter_model.safetensors")
    state = load_file(unbroken.output_dir / "checkpoint-2/reference_state.safetensors")
    policy = load_file(unbroken.output_dir / "checkpoint-2/adapter_model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    moved, total = 0, 0
    for name, value in state.items():
        key = name.replace(".default.", ".").replace(".default", "")
        far = (policy[key] - start[key]).abs() > 1e-4
        moved += ((value != start[key]) & far).sum().item()
        total += far.sum().item()
    print(f"\n{moved / total:.1%} of {total} weights moved")
    assert moved > 0.99 * total
