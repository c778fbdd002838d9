"""Adapters that TRL, here or in a newer version, refuses or rounds: on the head, whole modules, DoRA on a 4-bit base."""

import pytest
import torch
from safetensors.torch import load_file

from tests.support import host
from tests.support.new_tokens import save_base
from tests.support.tiny import PROJECTIONS, chat_row, dpo_config, save_adapter, write_rows

NF4 = {"adapter": "qlora", "load_in_4bit": True}


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A base whose head is a matrix of its own, so that an adapter on it is no adapter of the embeddings."""
    return save_base(tmp_path_factory.mktemp("untied"), False)


def trained(base, tmp_path, kind, **settings):
    """Train from an adapter of this kind; returns config and run, and by key how far each tensor has moved."""
    sft = save_adapter(base, tmp_path / "sft", **kind)
    rows = [chat_row(f"Question {n}?", f"Good answer {n}.", f"Bad {n}.") for n in range(8)]
    data = [{"path": str(write_rows(tmp_path / "rows.jsonl", rows)), "ds_type": "json", "type": "dpo_plugin.chat"}]
    config = dpo_config(base, tmp_path / "out", lora_model_dir=str(sft), datasets=data, **settings)
    run = host.train(config, tmp_path)
    start, end = (weights(folder) for folder in (sft, run.output_dir))
    assert start.keys() == end.keys()
    assert run.lines[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert run.lines[-1]["loss"] < 0.69
    return config, run, {key: (end[key] - start[key]).abs().max().item() for key in start}


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"lora_target_modules": [*PROJECTIONS, "lm_head"]}, {"target_modules": [*PROJECTIONS, "lm_head"]}),
        ({"lora_modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
    ],
    ids=["LoRA", "whole"],
)
def test_an_adapter_on_the_head_is_trained_and_resumes(untied, tmp_path, keys, kind):
    """TRL 1.16 refuses a LoRA there (trl/trainer/dpo_trainer.py:835)."""
    evaluated = {"val_set_size": 0.25, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    config, run, moved = trained(untied, tmp_path, kind, **keys, **evaluated)
    on_head = [distance for key, distance in moved.items() if "lm_head" in key and "base_layer" not in key]
    assert on_head
    assert min(on_head) > 1e-4
    resumed = {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": str(run.output_dir / "checkpoint-2")}
    again = weights(host.train({**config, **resumed}, tmp_path).output_dir)
    assert all(torch.equal(again[key], value) for key, value in weights(run.output_dir).items())


def test_dora_on_a_4_bit_base_is_trained_in_fp32(base_dir, tmp_path):
    """TRL 1.9 to 1.14 round what trains there to bf16, where a magnitude stands still (trl 7268)."""
    _, run, moved = trained(base_dir, tmp_path, {"use_dora": True}, peft_use_dora=True, learning_rate=1e-4, **NF4)
    magnitudes = [p for name, p in run.trainer.model.policy_parameters() if "lora_magnitude_vector" in name]
    assert len(magnitudes) == 4 * len(PROJECTIONS)
    assert {magnitude.dtype for magnitude in magnitudes} == {torch.float32}
    assert min(distance for key, distance in moved.items() if "lora_magnitude_vector" in key) > 1e-5
