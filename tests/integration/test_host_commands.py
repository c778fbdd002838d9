"""axolotl's own commands on the YAML of a finished run mean the DPO adapter, and need one process."""

import sys

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support import forked, host
from tests.support.tiny import ROOT, dpo_config

IDS = torch.arange(5, 45).reshape(2, 20)
HELD_OUT = [
    {"path": str(ROOT / "recipes/data/preferences_heldout.jsonl"), "ds_type": "json", "type": "dpo_plugin.chat"}
]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def finished(base_dir, sft_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    settings = {"lora_model_dir": str(sft_dir), "test_datasets": HELD_OUT, "save_strategy": "no", "save_steps": None}
    return host.train(dpo_config(base_dir, folder / "out", **settings), folder)


FSDP2 = yaml.safe_load((ROOT / "recipes/qwen72b-dpo-fsdp.yaml").read_text(encoding="utf-8"))
ENGINES = {
    "zero3": {"deepspeed": str(ROOT / "deepspeed_configs/zero3_bf16.json")},
    "fsdp2": {key: FSDP2[key] for key in ("fsdp_version", "fsdp_config")},
}


def axolotl(command, finished, *words, stdin="", engine):
    """Run a command on one process and on the YAML of a run on many; returns what it printed."""
    content = yaml.safe_load((finished.output_dir.parent / "config.yaml").read_text(encoding="utf-8"))
    config = finished.output_dir.parent / f"{engine}.yaml"
    config.write_text(yaml.safe_dump({**content, **ENGINES[engine]}), encoding="utf-8")
    launcher = [] if command == "merge-lora" else ["--launcher", "python"]
    line = ["axolotl", command, str(config), *launcher, *words]
    done = forked.run(line, stdin=stdin)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def with_adapter(base_dir, folder):
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), str(folder)))


@pytest.mark.core
def test_merge_lora_merges_the_dpo_adapter_unless_told_otherwise(finished, base_dir, sft_dir):
    told = axolotl("merge-lora", finished, engine="zero3")
    assert "merge-lora uses the DPO adapter" in told
    merged = logits(AutoModelForCausalLM.from_pretrained(finished.output_dir / "merged"))
    policy, sft = with_adapter(base_dir, finished.output_dir), with_adapter(base_dir, sft_dir)
    assert (merged - policy).abs().max() < 1e-4
    assert (merged - sft).abs().max() > 1e-3
    axolotl("merge-lora", finished, "--lora-model-dir", str(sft_dir), engine="fsdp2")
    merged = logits(AutoModelForCausalLM.from_pretrained(finished.output_dir / "merged"))
    assert (merged - sft).abs().max() < 1e-4


@pytest.mark.core
def test_merging_from_nf4_says_in_which_precision(finished, monkeypatch):
    from axolotl.utils.dict import DictDefault

    from dpo_plugin.host.commands import running

    said = []
    monkeypatch.setattr(running.LOG, "info", said.append)
    cfg = DictDefault(
        {"merge_lora": True, "adapter": "qlora", "output_dir": str(finished.output_dir), "lora_model_dir": "x"}
    )
    running.use_trained_adapter(cfg, "merge-lora")
    assert cfg.lora_model_dir == str(finished.output_dir)
    assert "NF4 round trip" in said[-1]


def test_inference_uses_the_dpo_adapter(finished):
    told = axolotl("inference", finished, stdin="Hello\n", engine="zero3")
    assert f"inference uses the DPO adapter in {finished.output_dir}" in told


def test_evaluate_measures_the_dpo_adapter_against_the_sft_adapter(finished):
    metrics = finished.trainer.evaluate()
    axolotl("evaluate", finished, engine="fsdp2")
    table = dict(line.split(",")[::2] for line in (finished.output_dir / "eval_summary.csv").read_text().splitlines())
    assert float(table["rewards/margins"]) == pytest.approx(metrics["eval_rewards/margins"], abs=1e-5)
    assert metrics["eval_rewards/margins"] != 0
    assert "eval_logps/chosen_displacement" in metrics
    assert not [name for name in table if "displacement" in name], "an evaluation alone has no step 0"


def test_commands_before_training_say_that_there_is_no_adapter(base_dir, sft_dir, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(dpo_config(base_dir, tmp_path / "out", lora_model_dir=str(sft_dir))))
    done = forked.run(["axolotl", "merge-lora", str(config)])
    assert done.returncode != 0
    assert "needs the DPO adapter" in done.stdout + done.stderr


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("command", ["merge-lora", "inference", "evaluate"])
def test_what_splits_the_model_is_left_out_on_one_process_alone(command, engine, monkeypatch):
    from axolotl.utils.dict import DictDefault

    from dpo_plugin.host.commands.running import leave_out_engine, running_command

    monkeypatch.setattr(sys, "argv", ["axolotl", command, "config.yaml"])
    for ranks in ("1", "8"):
        monkeypatch.setenv("WORLD_SIZE", ranks)
        cfg = DictDefault({"rl": "dpo", **ENGINES[engine]})
        assert running_command(cfg) == command
        leave_out_engine(cfg)
        assert set(cfg) == ({"rl"} if ranks == "1" else {"rl", *ENGINES[engine]})
