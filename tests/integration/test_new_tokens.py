"""An SFT adapter with new tokens, as axolotl's own SFT writes it, through DPO, evaluation, comparison and merge."""

import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_plugin.errors import AdapterError
from dpo_plugin.host.commands.compare import compare
from dpo_plugin.model.adapter_config import AdapterFolder
from dpo_plugin.model.adapters import POLICY, REFERENCE, attach, without_copies
from tests.support import host
from tests.support.new_tokens import dpo_settings, resized, run_sft, save_base
from tests.support.tiny import dpo_config


@pytest.fixture(scope="module", params=["tied", "untied"])
def life(request, tmp_path_factory):
    """Base, SFT adapter and finished DPO run."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save_base(folder / "base", request.param == "tied")
    sft = run_sft(base, folder)
    return base, sft, host.train(dpo_config(base, folder / "dpo", **dpo_settings(sft, folder)), folder)


def logits(model, folder):
    ids = AutoTokenizer.from_pretrained(folder)("Call <|tool|> 7 <|/tool|> now", return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(ids).logits


def test_dpo_starts_from_it_and_saves_what_peft_reads(life):
    base, sft, run = life
    assert run.lines[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert run.lines[-1]["rewards/margins"] > 0.01
    on_disk = without_copies(load_file(sft / "adapter_model.safetensors"))
    assert sum("embed_tokens" in key or "lm_head" in key for key in on_disk) == 2
    reference = PeftModel.from_pretrained(resized(base), str(sft)).state_dict()
    policy = PeftModel.from_pretrained(resized(base), str(run.output_dir)).state_dict()
    held = run.trainer.accelerator.unwrap_model(run.trainer.model).state_dict()
    for name, peft in ((REFERENCE, reference), (POLICY, policy)):
        trained = {key: value for key, value in peft.items() if f".{POLICY}." in key}
        assert len(trained) == len(on_disk)
        for key, value in trained.items():
            assert torch.equal(held[key.replace(f".{POLICY}.", f".{name}.")], value), key
    moved = "base_model.model.model.embed_tokens.modules_to_save.default.weight"
    assert (policy[moved] - reference[moved])[-2:].abs().max() > 1e-4


def test_a_config_without_the_new_tokens_is_told_what_to_write(life):
    base, sft, _ = life
    folder = AdapterFolder.open(sft, "lora_model_dir")
    with pytest.raises(AdapterError, match=f"write: tokenizer_config: {sft}. It was"):
        attach(AutoModelForCausalLM.from_pretrained(base), folder, folder)


def test_evaluate_and_compare_measure_it(life, monkeypatch):
    from axolotl.cli import evaluate

    _, _, run = life
    config = run.output_dir.parent / "config.yaml"
    expected = run.trainer.evaluate()
    assert expected["eval_rewards/margins"] > 0.01
    monkeypatch.setattr(sys, "argv", ["axolotl", "evaluate", str(config)])
    evaluate.do_cli(str(config))
    table = dict(line.split(",")[::2] for line in (run.output_dir / "eval_summary.csv").read_text().splitlines())
    assert float(table["rewards/margins"]) == pytest.approx(expected["eval_rewards/margins"], abs=1e-5)
    assert compare(config).held_out.margin == pytest.approx(expected["eval_rewards/margins"], abs=1e-5)


def test_merge_lora_gives_the_policy(life):
    from axolotl.cli import merge_lora

    base, _, run = life
    merge_lora.do_cli(str(run.output_dir.parent / "config.yaml"))
    policy = PeftModel.from_pretrained(resized(base), str(run.output_dir))
    merged = AutoModelForCausalLM.from_pretrained(run.output_dir / "merged")
    expected = logits(policy, run.output_dir)
    torch.testing.assert_close(logits(merged, run.output_dir / "merged"), expected, atol=1e-4, rtol=0)
