"""An SFT adapter with new tokens on a 16-bit base, sharded over two ranks: one process's curve, adapter and commands."""

import math
import sys

import pytest
import torch
from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights

from dpo_plugin.model.adapters import without_copies
from tests.ranks.shipped import BF16, config, curve
from tests.support import host
from tests.support.cpu_ranks import allow_bf16, launch
from tests.support.new_tokens import dpo_settings, resized, run_sft, save_base

STEPS = 4
SHARDED = {"zero3": ("zero3-nf4", BF16), "fsdp2": ("fsdp2-bf16", {})}


def settings(sft, folder, ranks):
    steps = {"max_steps": STEPS, "eval_steps": STEPS, "save_strategy": "no", "save_steps": None}
    sizes = {"micro_batch_size": 4 // ranks, "learning_rate": 1e-3, "dpo_plugin": {"reference": {"cache": False}}}
    return {**dpo_settings(sft, folder), **steps, **sizes}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tied base, its SFT adapter, and the DPO run of one process."""
    folder = tmp_path_factory.mktemp("tokens")
    base = save_base(folder / "base", tied=True)
    sft = run_sft(base, folder)
    alone = {"deepspeed": None, **settings(sft, folder, ranks=1)}
    with pytest.MonkeyPatch.context() as patch:
        allow_bf16(patch.setattr)
        return base, sft, host.train(config("zero3-nf4", base, sft, folder, **BF16, **alone), folder)


@pytest.mark.parametrize("engine", SHARDED)
def test_two_ranks_train_it_as_one_process_does(engine, trained, tmp_path, monkeypatch):
    base, sft, alone = trained
    recipe, precision = SHARDED[engine]
    run = launch(config(recipe, base, sft, tmp_path, **{**precision, **settings(sft, tmp_path, ranks=2)}), tmp_path)
    assert run.returncode == 0, run.error()
    assert run.lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    expected = curve(alone.lines)
    assert len(expected) == len(run.lines) == STEPS
    difference = (curve(run.lines) - expected).abs().amax(0)
    print(f"\n{engine}: max difference of loss {difference[0]:.1e}, of margin {difference[1]:.1e}")
    assert difference.max() <= 2e-3
    assert run.facts["masters"] == ["torch.float32"]
    assert_whole_adapter(run, base, sft)
    assert_commands_take_it(run, base, monkeypatch)


def assert_whole_adapter(run, base, sft):
    """Each tensor of the SFT adapter is there, moved, and where PEFT reads it."""
    saved = without_copies(load_peft_weights(str(run.output_dir), device="cpu"))
    start = without_copies(load_peft_weights(str(sft), device="cpu"))
    assert {key: (value.shape, value.dtype) for key, value in saved.items()} == {
        key: (value.shape, torch.float32) for key, value in start.items()
    }
    moved = [key for key in saved if not torch.equal(saved[key], start[key])]
    assert sum("embed_tokens" in key or "lm_head" in key for key in moved) == 2
    held = PeftModel.from_pretrained(resized(base), str(run.output_dir)).state_dict()
    policy = [value for key, value in held.items() if ".default." in key]
    assert len(policy) == len(saved)
    assert all(any(torch.equal(value, own) for own in policy) for value in saved.values())


def assert_commands_take_it(run, base, monkeypatch):
    """On one process, with the YAML as it is but for the plugin that lets ranks live on a CPU."""
    from axolotl.cli import evaluate, merge_lora

    file = run.output_dir.parent / "config.yaml"
    file.write_text(file.read_text().replace("- tests.support.cpu_ranks.CPURanks\n", ""))
    allow_bf16(monkeypatch.setattr)
    monkeypatch.setattr(sys, "argv", ["axolotl", "evaluate", str(file)])
    evaluate.do_cli(str(file))
    table = dict(line.split(",")[::2] for line in (run.output_dir / "eval_summary.csv").read_text().splitlines())
    margin = run.evaluations[-1]["eval_rewards/margins"]
    assert margin > 0.02
    assert float(table["rewards/margins"]) == pytest.approx(margin, abs=2e-3)
    merge_lora.do_cli(str(file))
    merged = resized(run.output_dir / "merged")
    policy = PeftModel.from_pretrained(resized(base), str(run.output_dir))
    ids = torch.arange(merged.config.vocab_size - 40, merged.config.vocab_size)[None]
    with torch.no_grad():
        expected, found = (torch.log_softmax(model.eval()(ids).logits.float(), -1) for model in (policy, merged))
    assert (found - expected).abs().max() < 0.2  # 16-bit weights
