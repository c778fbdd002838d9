"""Whole runs on a tiny model through axolotl's own path."""

import json
import shutil
from pathlib import Path

import axolotl
import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_plugin.model.adapters import POLICY, REFERENCE, PolicyReferenceModel, adapter_digest, adapter_tensors
from tests.support import host
from tests.support.tiny import ROOT, dpo_config

pytestmark = pytest.mark.core
STOCK = [
    {"path": str(ROOT / "recipes/data/preferences.jsonl"), "ds_type": "json", "type": "chat_template.argilla_chat"}
]
NF4 = {"adapter": "qlora", "load_in_4bit": True}
KNOWN = ["grad_norm", "learning_rate", "epoch", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
         "rewards/margins", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"]  # fmt: skip


@pytest.fixture(scope="module", params=["fp32", "nf4"])
def run(request, base_dir, sft_dir, tmp_path_factory) -> host.Run:
    folder = tmp_path_factory.mktemp(request.param)
    settings = {"lora_model_dir": str(sft_dir), **(NF4 if request.param == "nf4" else {})}
    return host.train(dpo_config(base_dir, folder / "out", **settings), folder)


def test_the_run_starts_at_ln_2_and_margin_0(run):
    assert run.lines[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert run.lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert run.lines[-1]["loss"] < 0.69


def test_the_fields_that_users_know_and_one_of_ours_are_logged(run):
    assert not [name for name in [*KNOWN, "logratios/margin_per_token"] if name not in run.lines[-1]]


def test_the_adapters_travel_is_logged(run):
    adapter_norms = [line["adapter/distance"] for line in run.lines]
    assert adapter_norms == sorted(adapter_norms)
    assert run.lines[0]["adapter/update_norm"] == pytest.approx(adapter_norms[0], rel=1e-4)
    model = run.trainer.model
    ours, theirs = adapter_tensors(model, POLICY), adapter_tensors(model, REFERENCE)
    expected = sum((ours[key].float() - theirs[key].float()).square().sum() for key in ours) ** 0.5
    assert adapter_norms[-1] == pytest.approx(expected.item(), rel=1e-4)


def test_a_logging_step_prints_one_short_line_and_no_bar_without_a_terminal(base_dir, sft_dir, tmp_path, capfd):
    host.train(dpo_config(base_dir, tmp_path / "out", lora_model_dir=str(sft_dir), max_steps=2), tmp_path)
    printed = capfd.readouterr()
    (first,) = [line for line in printed.out.splitlines() if line.startswith("step 1/2  loss 0.6931  margin +0.000")]
    assert first.endswith(" left")
    assert "2 steps in " in printed.out
    assert "'loss'" not in printed.out
    assert "step/s" not in printed.err


def test_the_policy_started_from_the_sft_adapter_and_has_moved(run, sft_dir):
    model = run.trainer.model
    assert isinstance(model, PolicyReferenceModel)
    assert model.digests[POLICY] == model.digests[REFERENCE]
    expected = load_peft_weights(str(sft_dir), device="cpu")
    moved = adapter_tensors(model, POLICY)
    distance = sum((moved[key] - expected[key]).norm() for key in expected)
    assert 0 < distance < sum(value.norm() for value in expected.values())


def test_the_references_bytes_are_those_of_the_file(run, sft_dir):
    model = run.trainer.model
    expected = load_peft_weights(str(sft_dir), device="cpu")
    reference = adapter_tensors(model, REFERENCE)
    assert reference.keys() == expected.keys()
    assert all(torch.equal(reference[key], expected[key]) for key in expected)
    assert adapter_digest(model, REFERENCE) == model.digests[REFERENCE]


def test_nothing_but_the_policy_is_trainable_or_in_the_optimizer(run):
    model = run.trainer.model
    policy = dict(model.policy_parameters())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == policy.keys()
    assert {p.dtype for p in policy.values()} == {torch.float32}
    optimised = {id(p) for group in run.trainer.optimizer.param_groups for p in group["params"]}
    assert optimised <= {id(p) for p in policy.values()}


def test_output_and_checkpoint_hold_the_policy_adapter_alone(run):
    for folder in (run.output_dir, run.output_dir / "checkpoint-4"):
        names = {file.name for file in folder.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
        assert not [name for name in names if name.startswith(("model", "pytorch_model"))]
        assert not {"ref", "reference"} & names
        assert not [key for key in load_file(folder / "adapter_model.safetensors") if "reference" in key]


def test_peft_loads_the_output_with_every_key_matched(run, base_dir):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), str(run.output_dir))
    result = model.load_adapter(str(run.output_dir), "again")
    assert not result.missing_keys
    assert not result.unexpected_keys
    saved = load_file(run.output_dir / "adapter_model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in adapter_tensors(run.trainer.model, POLICY).items())


def norm_of_b(folder: Path) -> float:
    tensors = load_file(folder / "adapter_model.safetensors")
    return sum(value.norm().item() for key, value in tensors.items() if "lora_B" in key)


def test_one_line_makes_a_stock_config_start_from_the_sft_adapter(base_dir, sft_dir, tmp_path):
    """The control without the line shows what the README says of stock axolotl; when it fails, stock has changed.

    Stock ignores lora_model_dir: it trains a fresh LoRA, with the bare base as reference, and saves that base, adapter
    injected, beside it.
    """
    settings = {"lora_model_dir": str(sft_dir), "datasets": STOCK, "save_strategy": "no", "save_steps": None}
    ours = host.train(dpo_config(base_dir, tmp_path / "ours", **settings), tmp_path / "a")
    stock = host.train(dpo_config(base_dir, tmp_path / "stock", plugins=None, **settings), tmp_path / "b")
    assert isinstance(ours.trainer.model, PolicyReferenceModel)
    assert not isinstance(stock.trainer.model, PolicyReferenceModel)
    assert list(stock.trainer.model.peft_config) == ["default"]
    assert stock.trainer.ref_model is None
    sft = norm_of_b(sft_dir)
    assert norm_of_b(ours.output_dir) == pytest.approx(sft, rel=0.2)
    assert norm_of_b(stock.output_dir) < 0.3 * sft
    assert ours.lines[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    saved = load_file(stock.output_dir / "model.safetensors")
    layers = {key.replace(".base_layer", "") for key in saved if ".lora_" not in key}
    assert layers == load_file(base_dir / "model.safetensors").keys()
    assert not (ours.output_dir / "model.safetensors").exists()


def test_stock_merges_the_sft_adapter_on_the_yaml_of_a_run(base_dir, sft_dir, tmp_path):
    """The control of what `merge-lora` means with the plugin (test_host_commands.py)."""
    from axolotl.cli.merge_lora import do_cli

    settings = {"plugins": None, "lora_model_dir": str(sft_dir), "datasets": STOCK, "save_strategy": "no"}
    run = host.train(dpo_config(base_dir, tmp_path / "out", **settings, save_steps=None), tmp_path)
    do_cli(str(tmp_path / "config.yaml"))
    merged = AutoModelForCausalLM.from_pretrained(run.output_dir / "merged").state_dict()
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    expected = PeftModel.from_pretrained(base, str(sft_dir)).merge_and_unload().state_dict()
    assert max((merged[key] - value).abs().max() for key, value in expected.items()) < 1e-5


@pytest.mark.parametrize("kind", ["default", "argilla_chat"])
def test_stock_cuts_short_answers_at_the_wrong_place_before_0_21(kind, tokenizer):
    """The control of test_data_runs.py's short answers; the answer "a" is found inside <|im_start|>."""
    from axolotl.prompt_strategies.dpo import chat_template
    from axolotl.utils.dict import DictDefault

    ask, answer = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "a"}
    row = {"messages": [ask], "chosen": [ask, answer], "rejected": [ask, {"role": "assistant", "content": "no idea"}]}
    cfg = DictDefault({"chat_template": "tokenizer_default", "datasets": [{"type": f"chat_template.{kind}"}]})
    transform, _ = getattr(chat_template, kind)(cfg)
    found = transform(row, tokenizer=tokenizer)["chosen"]
    cut_wrongly = found.startswith("art|>")
    assert cut_wrongly == (Version(axolotl.__version__) < Version("0.21"))
    assert cut_wrongly or found == "a<|im_end|>"


def test_a_fresh_lora_has_the_base_as_reference(base_dir, tmp_path):
    run = host.train(dpo_config(base_dir, tmp_path / "out", max_steps=2, save_strategy="no", save_steps=None), tmp_path)
    assert not run.trainer.model.has_reference
    assert run.lines[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert run.lines[1]["rewards/margins"] != 0


@pytest.mark.parametrize("evaluation", [{}, {"val_set_size": 0.2, "eval_strategy": "steps", "eval_steps": 1}])
def test_a_wrong_reference_stops_the_run_at_step_0(base_dir, sft_dir, tmp_path, monkeypatch, evaluation):
    """Also where it is wrong in training alone and the host evaluates before the first step."""
    from dpo_plugin.errors import ReferenceMismatchError
    from dpo_plugin.model.references import AdapterReference

    monkeypatch.setattr(
        AdapterReference, "run", lambda self, model, batch, forward: run_off(self, model, batch, forward)
    )

    def run_off(self, model, batch, forward):
        with self.policy.adapters_off() if self.policy.training else self.policy.reference_active():
            return forward(model, batch)

    config = dpo_config(base_dir, tmp_path / "out", lora_model_dir=str(sft_dir), max_steps=1, **evaluation)
    with pytest.raises(ReferenceMismatchError, match="every reward must be 0, but the largest is"):
        host.train(config, tmp_path)


def test_dropout_of_the_models_config_is_off(base_dir, sft_dir, tmp_path):
    base = shutil.copytree(base_dir, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    run = host.train(
        dpo_config(base, tmp_path / "out", lora_model_dir=str(sft_dir), max_steps=1, learning_rate=1e-12), tmp_path
    )
    assert run.lines[0]["rewards/chosen"] == run.lines[0]["rewards/rejected"] == 0
    assert run.trainer.model.config.attention_dropout == 0.1


def test_a_reference_that_changes_is_noticed(base_dir, sft_dir):
    from dpo_plugin.errors import AdapterError
    from dpo_plugin.host.plugin import check_reference_unchanged
    from dpo_plugin.model.adapter_config import AdapterFolder
    from dpo_plugin.model.adapters import attach

    folder = AdapterFolder.open(sft_dir, "lora_model_dir")
    model = attach(AutoModelForCausalLM.from_pretrained(base_dir), folder, folder)
    check_reference_unchanged(model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if ".reference." in name).add_(1)
    with pytest.raises(AdapterError, match="has changed during training"):
        check_reference_unchanged(model)


def test_another_adapter_may_be_the_reference(base_dir, sft_dir, tmp_path):
    from tests.support.tiny import save_adapter

    other = save_adapter(base_dir, tmp_path / "other", seed=5, r=4, target_modules=["q_proj", "v_proj"])
    settings = {"dpo_plugin": {"reference": {"adapter_dir": str(other)}}, "save_strategy": "no", "save_steps": None}
    config = dpo_config(base_dir, tmp_path / "out", lora_model_dir=str(sft_dir), max_steps=1, **settings)
    run = host.train(config, tmp_path)
    assert run.trainer.model.digests[REFERENCE] != run.trainer.model.digests[POLICY]
    assert abs(run.lines[0]["rewards/margins"]) > 1e-3
    saved = json.loads((run.output_dir / "adapter_config.json").read_text())
    assert saved["r"] == 8
