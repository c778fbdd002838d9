"""Resume, save, best model: the life of a DPO adapter."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dpo_plugin.errors import CheckpointError
from tests.support import forked, host
from tests.support.tiny import ROOT, dpo_config, save_adapter

HELD_OUT = [
    {"path": str(ROOT / "recipes/data/preferences_heldout.jsonl"), "ds_type": "json", "type": "dpo_plugin.chat"}
]


def config(base_dir, sft_dir, output, **settings):
    usual = {
        "lora_model_dir": str(sft_dir),
        "max_steps": 12,
        "save_steps": 6,
        "lr_scheduler": "cosine",
        "warmup_steps": 2,
    }
    return dpo_config(base_dir, output, **{**usual, **settings})


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(base_dir, sft_dir, tmp_path_factory):
    """12 steps at once."""
    folder = tmp_path_factory.mktemp("whole")
    return host.train(config(base_dir, sft_dir, folder / "out"), folder)


@pytest.fixture(scope="module")
def half(whole, tmp_path_factory):
    """An output folder as a run leaves it that stopped after 6 of 12 steps."""
    folder = tmp_path_factory.mktemp("half") / "out"
    folder.mkdir()
    shutil.copytree(whole.output_dir / "checkpoint-6", folder / "checkpoint-6")
    return folder


@pytest.mark.core
@pytest.mark.parametrize("how", ["resume_from_checkpoint", "auto_resume_from_checkpoints"])
def test_6_steps_and_resume_and_6_are_12(base_dir, sft_dir, whole, half, tmp_path, how):
    shutil.copytree(half, tmp_path / "out")
    value = str(tmp_path / "out/checkpoint-6") if how == "resume_from_checkpoint" else True
    resumed = host.train(config(base_dir, sft_dir, tmp_path / "out", **{how: value}), tmp_path)
    expected, found = weights(whole.output_dir), weights(resumed.output_dir)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)  # fp32 on a CPU: bit by bit
    lines = [{key: line[key] for key in ("loss", "rewards/margins", "learning_rate")} for line in resumed.lines]
    assert (
        lines[6:]
        == [{key: line[key] for key in ("loss", "rewards/margins", "learning_rate")} for line in whole.lines][6:]
    )


def test_a_resumed_run_measures_displacement_from_the_same_start(base_dir, sft_dir, tmp_path):
    """Against the bare base no log-ratio tells the start, so the first line stands for it."""
    settings = {"max_steps": 4, "save_steps": 2, "dpo_plugin": {"reference": {"strategy": "base"}}}
    whole = host.train(config(base_dir, sft_dir, tmp_path / "whole", **settings), tmp_path)
    settings["resume_from_checkpoint"] = str(tmp_path / "whole/checkpoint-2")
    resumed = host.train(config(base_dir, sft_dir, tmp_path / "resumed", **settings), tmp_path)
    expected, found = ([line["logps/chosen_displacement"] for line in run.lines] for run in (whole, resumed))
    assert expected[0] == 0
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["checkpoint-6", "."])
def test_what_is_saved_holds_no_reference_but_says_which(name, whole):
    folder = whole.output_dir / name
    assert not [file for file in folder.iterdir() if "reference" in file.name or file.name == "ref"]
    marker = json.loads((folder / "dpo_plugin.json").read_text())
    assert marker["reference"] == {
        "strategy": "adapter",
        "identity": f"sha256:{whole.trainer.model.digests['reference']}",
    }


def test_another_reference_is_refused_with_both_digests(base_dir, half, tmp_path):
    shutil.copytree(half, tmp_path / "out")
    other = save_adapter(base_dir, tmp_path / "sft2", seed=7)
    with pytest.raises(
        CheckpointError, match=r"reference adapter sha256:\w{64}, and this run has adapter sha256:\w{64}"
    ):
        host.train(config(base_dir, other, tmp_path / "out", auto_resume_from_checkpoints=True), tmp_path)


def test_a_checkpoint_without_our_digest_is_refused(base_dir, sft_dir, half, tmp_path):
    shutil.copytree(half, tmp_path / "out")
    (tmp_path / "out/checkpoint-6/dpo_plugin.json").unlink()
    with pytest.raises(CheckpointError, match=r"does not say which reference.*write: lora_model_dir: .*checkpoint-6"):
        host.train(config(base_dir, sft_dir, tmp_path / "out", auto_resume_from_checkpoints=True), tmp_path)


@pytest.mark.parametrize("damage", ["no state", "half a state", "half an adapter", "half an optimizer"])
def test_a_torn_checkpoint_is_passed_over_by_itself_and_refused_by_name(base_dir, sft_dir, half, tmp_path, damage):
    out = shutil.copytree(half, tmp_path / "out")
    torn = shutil.copytree(out / "checkpoint-6", out / "checkpoint-9")
    names = {"adapter": "adapter_model.safetensors", "optimizer": "optimizer.pt", "state": "trainer_state.json"}
    file = torn / names[damage.split()[-1]]
    file.unlink() if damage == "no state" else file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    resumed = host.train(config(base_dir, sft_dir, out, auto_resume_from_checkpoints=True, max_steps=7), tmp_path)
    assert [line["step"] for line in resumed.lines] == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(CheckpointError, match="is incomplete"):
        host.train(config(base_dir, sft_dir, out, resume_from_checkpoint=str(torn)), tmp_path)


def test_another_base_is_refused(base_dir, sft_dir, half, tmp_path):
    out = shutil.copytree(half, tmp_path / "out")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    settings = {"overrides_of_model_config": {"rope_parameters": rope}, "auto_resume_from_checkpoints": True}
    with pytest.raises(CheckpointError, match=r"trained on the base model \w{12}, and this run has \w{12}"):
        host.train(config(base_dir, sft_dir, out, **settings), tmp_path)


def test_a_finished_run_takes_no_further_step(base_dir, sft_dir, whole, tmp_path):
    out = shutil.copytree(whole.output_dir, tmp_path / "out")
    again = host.train(config(base_dir, sft_dir, out, auto_resume_from_checkpoints=True), tmp_path)
    assert again.trainer.state.global_step == 12
    expected = weights(whole.output_dir)
    assert all(torch.equal(value, expected[key]) for key, value in weights(out).items())


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on_from_the_last_whole_checkpoint(base_dir, sft_dir, whole, tmp_path):
    """Killed by SIGKILL as soon as a second checkpoint's folder appears, whatever is in it by then."""
    settings = config(base_dir, sft_dir, tmp_path / "out", save_steps=3, auto_resume_from_checkpoints=True)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "axolotl.cli.train", str(file)]
    run = forked.start(command)
    deadline = time.monotonic() + 300
    while not (tmp_path / "out/checkpoint-6").exists() and run.process.is_alive() and time.monotonic() < deadline:
        os.sched_yield()
    run.kill()
    assert (tmp_path / "out/checkpoint-3/trainer_state.json").is_file()
    resumed = host.train(settings, tmp_path)
    assert resumed.trainer.state.global_step == 12
    expected = weights(whole.output_dir)
    assert all(torch.equal(value, expected[key]) for key, value in weights(resumed.output_dir).items())


def test_ema_goes_on_from_where_its_reference_was(base_dir, sft_dir, tmp_path):
    settings = {"dpo_plugin": {"reference": {"strategy": "ema", "ema_steps": 2}}, "max_steps": 4, "save_steps": 2}
    at_once = host.train(config(base_dir, sft_dir, tmp_path / "a", **settings), tmp_path / "x")
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a/checkpoint-2", tmp_path / "b/checkpoint-2")
    resumed = host.train(
        config(base_dir, sft_dir, tmp_path / "b", auto_resume_from_checkpoints=True, **settings), tmp_path / "y"
    )
    assert [line["loss"] for line in resumed.lines[2:]] == [line["loss"] for line in at_once.lines[2:]]
    assert not (tmp_path / "a/reference_state.safetensors").exists()


def test_saved_keys_follow_the_convention_of_peft_and_vllm(whole):
    """`base_model.model.<module>.lora_A.weight`: vLLM matches no other and then serves the base (vllm #34186)."""
    for key in weights(whole.output_dir):
        assert key.startswith("base_model.model.model.layers.")
        assert key.endswith((".lora_A.weight", ".lora_B.weight"))


def test_the_adapter_config_names_the_base(whole, base_dir):
    saved = json.loads((whole.output_dir / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(base_dir)
    assert "revision" in saved


def test_the_model_card_tells_what_was_done(whole, base_dir):
    card = (whole.output_dir / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == str(base_dir)
    assert front["library_name"] == "peft"
    for words in (
        whole.trainer.model.digests["default"],
        "sigmoid",
        "**beta**: 0.1",
        "rewards/accuracies",
        "264 rows read",
    ):
        assert words in card


def test_old_checkpoints_go_and_the_best_comes_back(base_dir, sft_dir, tmp_path):
    settings = {
        "test_datasets": HELD_OUT, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 6, "save_total_limit": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/accuracies", "greater_is_better": True,
    }  # fmt: skip
    run = host.train(config(base_dir, sft_dir, tmp_path / "out", **settings), tmp_path)
    best = run.trainer.state.best_model_checkpoint
    evaluations = {
        line["step"]: line["eval_rewards/accuracies"] for line in run.trainer.state.log_history if "eval_loss" in line
    }
    assert run.trainer.state.best_metric == max(evaluations.values())
    kept = sorted(folder.name for folder in run.output_dir.glob("checkpoint-*"))
    assert len(kept) <= 2  # the best and the last
    assert all(torch.equal(value, weights(Path(best))[key]) for key, value in weights(run.output_dir).items())


def test_early_stopping_by_our_metric(base_dir, sft_dir, tmp_path):
    settings = {
        "test_datasets": HELD_OUT, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 8, "learning_rate": 0.0,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/margins", "greater_is_better": True,
        "early_stopping_patience": 2,
    }  # fmt: skip
    run = host.train(config(base_dir, sft_dir, tmp_path / "out", **settings), tmp_path)
    assert run.trainer.state.global_step == 3


@pytest.mark.core
def test_small_steps_are_not_rounded_away_on_a_quantised_base(base_dir, sft_dir, tmp_path):
    """At lr 1e-6, 20 steps: the adapter on NF4 travels as far as AdamW's steps in fp32 reach (host: 5 % in bf16)."""
    settings = {
        "learning_rate": 1e-6,
        "max_steps": 20,
        "save_strategy": "no",
        "save_steps": None,
        "warmup_steps": 0,
        "lr_scheduler": "constant",
    }
    fp32 = host.train(config(base_dir, sft_dir, tmp_path / "fp32", **settings), tmp_path / "a")
    nf4 = host.train(
        config(base_dir, sft_dir, tmp_path / "nf4", adapter="qlora", load_in_4bit=True, **settings), tmp_path / "b"
    )
    start = weights(sft_dir)

    def travel(run):
        end = weights(run.output_dir)
        return sum((end[key] - start[key]).abs().sum().item() for key in start)

    assert travel(nf4) >= 0.95 * travel(fp32)
