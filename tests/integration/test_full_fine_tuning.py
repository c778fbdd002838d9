"""Full fine-tuning in bf16 on one process: fp32 master weights, saved, resumed, or left out."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from dpo_plugin.engines.master_weights import FILE
from dpo_plugin.errors import CheckpointError
from tests.support import host
from tests.support.cpu_ranks import allow_bf16
from tests.support.tiny import dpo_config

STEPS = 6


def config(base_dir, output, compute=None, **settings):
    full = {
        **dict.fromkeys(("adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")),
        "bf16": True,
        "learning_rate": 2e-6,
        "weight_decay": 0.01,
        "lr_scheduler": "cosine",
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "dpo_plugin": {"compute": compute or {}},
    }
    return dpo_config(base_dir, output, **{**full, **settings})


@pytest.fixture(scope="module", autouse=True)
def bf16_on_a_cpu():
    with pytest.MonkeyPatch.context() as patch:
        allow_bf16(patch.setattr)
        yield


@pytest.fixture(scope="module")
def whole(base_dir, tmp_path_factory):
    """All steps at once."""
    folder = tmp_path_factory.mktemp("whole")
    return host.train(config(base_dir, folder / "out"), folder)


def resume(run, folder, base_dir, **settings):
    """Go on from the middle of a run, as if it had been stopped there."""
    shutil.copytree(run.output_dir / f"checkpoint-{STEPS // 2}", folder / f"out/checkpoint-{STEPS // 2}")
    return host.train(config(base_dir, folder / "out", auto_resume_from_checkpoints=True, **settings), folder)


def same(one, other):
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_optimizer_updates_fp32_and_bf16_is_saved(whole):
    assert whole.lines[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert whole.lines[-1]["weights/changed"] > 0.99
    saved = load_file(whole.output_dir / "model.safetensors")
    masters = load_file(whole.output_dir / f"checkpoint-{STEPS}" / FILE)
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert {value.dtype for value in masters.values()} == {torch.float32}
    assert all(torch.equal(saved[name], master.bfloat16()) for name, master in masters.items())
    assert not (whole.output_dir / FILE).exists()


def test_3_steps_and_resume_and_3_are_6_bit_by_bit(whole, base_dir, tmp_path):
    resumed = resume(whole, tmp_path, base_dir)
    for file in ("model.safetensors", f"checkpoint-{STEPS}/{FILE}"):
        assert same(resumed.output_dir / file, whole.output_dir / file), file
    assert [line["loss"] for line in resumed.lines] == [line["loss"] for line in whole.lines]


def test_a_checkpoint_without_its_master_weights_is_not_whole(whole, base_dir, tmp_path, caplog):
    folder = tmp_path / f"out/checkpoint-{STEPS // 2}"
    shutil.copytree(whole.output_dir / folder.name, folder)
    (folder / FILE).unlink()
    with pytest.raises(CheckpointError, match=f"is incomplete or damaged: {FILE} is missing"):
        host.train(config(base_dir, tmp_path / "out", resume_from_checkpoint=str(folder)), tmp_path)


def test_a_run_does_not_go_on_without_master_weights(whole, base_dir, tmp_path):
    with pytest.raises(CheckpointError, match=r"trained with fp32 master weights.*Write: .*master_weights: true"):
        resume(whole, tmp_path, base_dir, compute={"master_weights": False})


def test_false_leaves_the_weights_to_the_optimizer_as_the_host_made_them(base_dir, tmp_path):
    settings = config(base_dir, tmp_path / "out", {"master_weights": False}, learning_rate=5e-7, save_only_model=False)
    run = host.train(settings, tmp_path)
    held = {id(p) for group in run.trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.trainer.model.parameters()}
    dtypes = {name: p.dtype for name, p in run.trainer.model.named_parameters()}
    assert dtypes["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert dtypes["model.norm.weight"] == torch.float32
    assert run.lines[-1]["weights/changed"] < 0.1
    assert not list(run.output_dir.rglob(FILE))
    with pytest.raises(CheckpointError, match=r"without fp32 master weights.*Write: .*master_weights: false"):
        resume(run, tmp_path / "again", base_dir)


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_bnb_8bit", "adafactor", "paged_adamw_8bit"])
def test_the_hosts_other_optimizers_take_master_weights(base_dir, tmp_path, optimizer):
    settings = config(base_dir, tmp_path / "out", optimizer=optimizer, save_strategy="no", save_steps=None, max_steps=3)
    run = host.train(settings, tmp_path)
    held = [p for group in run.trainer.optimizer.param_groups for p in group["params"]]
    assert {p.dtype for p in held} == {torch.float32}
    assert run.lines[-1]["weights/changed"] > 0.9


def test_only_unfrozen_parameters_have_master_weights(base_dir, tmp_path):
    settings = config(base_dir, tmp_path / "out", unfrozen_parameters=["model.layers.1.mlp.*"], max_steps=3)
    run = host.train(settings, tmp_path)
    masters = load_file(run.output_dir / "checkpoint-3" / FILE)
    assert {name.rpartition(".mlp.")[0] for name in masters} == {"model.layers.1"}
    assert run.lines[-1]["weights/changed"] > 0.99
