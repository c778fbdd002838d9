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
        **BF16, "deepspeed": str(zero2), "dpo_plugin": ema, "max_steps": 3, "save_steps": 1, "save_total_limit": 3,
        "learning_rate": 2e-3, "test_datasets": None, "eval_steps": None, "eval_strategy": "no",
        "gradient_accumulation_steps": 1,
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
    """After each update: reference = (1 − α) · reference + α · policy, of which bf16 would round nearly all away."""
    start = expected = load_file(sft / "adapter_model.safetensors")
    for step in (1, 2):
        folder = unbroken.output_dir / f"checkpoint-{step}"
        named = load_file(folder / "reference_state.safetensors")
        state = {name.replace(".default.", ".").replace(".default", ""): value for name, value in named.items()}
        policy = load_file(folder / "adapter_model.safetensors")
        assert {value.dtype for value in state.values()} == {torch.float32}
        far = {name: (policy[name] - start[name]).abs() > 1e-4 for name in state}
        moved = sum(((state[name] != start[name]) & far[name]).sum().item() for name in state)
        total = sum(mask.sum().item() for mask in far.values())
        print(f"\nstep {step}: {moved / total:.1%} of {total} weights moved")
        assert moved > 0.99 * total
        # The policy rounded to bf16 would put weights of 0.05 up to 1e-6 elsewhere.
        expected = {name: expected[name].lerp(policy[name], ALPHA) for name in state}
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-7)
