"""Layouts, token budget, checkpointed layers and bad numbers in whole runs."""

import logging
import math

import pytest
import torch
from axolotl.utils.schemas.config import AxolotlInputConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_plugin.compute import attention
from dpo_plugin.compute.logps import run_model
from dpo_plugin.errors import DataError, NotFiniteError
from dpo_plugin.host.workarounds import keep_nf4_as_packed
from tests.support import host
from tests.support.tiny import chat_row, dpo_config, save_base, tokenizer, write_rows
from tests.unit.compute.test_compute import assert_same, batch_of, with_lora

ROWS = [
    chat_row(f"Question {n}? " * (1 + n % 4), f"Good answer {n}. " * (1 + n % 3), f"Bad {n}.", "ab"[n % 2])
    for n in range(16)
]


def config(base_dir, sft_dir, tmp_path, name="run", rows=ROWS, **settings):
    folder = tmp_path / name
    folder.mkdir()
    data = [{"path": str(write_rows(folder / "rows.jsonl", rows)), "ds_type": "json", "type": "dpo_plugin.chat"}]
    usual = {"datasets": data, "lora_model_dir": str(sft_dir), "save_strategy": "no", "save_steps": None}
    return dpo_config(base_dir, folder / "out", **{**usual, **settings})


def curve(run):
    names = ("loss", "rewards/margins", "logps/rejected", "logps/chosen")
    return torch.tensor([[line[name] for name in names] for line in run.lines])


def compute(**section):
    return {"dpo_plugin": {"compute": section}}


@pytest.fixture(scope="module")
def flat(base_dir, sft_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flat")
    return host.train(config(base_dir, sft_dir, folder), folder)


@pytest.mark.parametrize(
    "settings",
    [
        compute(prefix_sharing=False),
        {"attn_implementation": "sdpa"},
        {"sdp_attention": True},
        compute(max_tokens=150),
        compute(max_tokens=220, prefix_sharing=False),
        compute(logits_chunk=3),
        {"pad_to_multiple_of": 32},
        {"gradient_checkpointing": True, **compute(checkpoint_layers=1)},
    ],
    ids=["two rows", "by name", "by flag", "packs", "packs of two rows", "chunks", "padded", "one layer"],
)
def test_how_a_step_is_computed_changes_nothing(base_dir, sft_dir, tmp_path, flat, settings, caplog):
    with caplog.at_level(logging.INFO):
        run = host.train(config(base_dir, sft_dir, tmp_path, **settings), tmp_path)
    torch.testing.assert_close(curve(run), curve(flat), atol=2e-4, rtol=1e-4)
    two_rows = "two rows" in caplog.text
    collator = run.trainer.data_collator
    assert collator.flat != two_rows
    assert caplog.text.count("two rows each") == two_rows
    assert (run.trainer.model.config._attn_implementation == attention.NAME) != two_rows
    section = settings.get("dpo_plugin", {}).get("compute", {})
    if "max_tokens" in section:
        batch = next(iter(run.trainer.get_train_dataloader()))
        assert len(batch["packs"]) > 1
    if "checkpoint_layers" in section:
        layers = run.trainer.model.get_base_model().model.layers
        assert [layer.gradient_checkpointing for layer in layers] == [True] + [False] * (len(layers) - 1)


def test_packs_are_one_step_with_gradient_accumulation_and_a_kept_reference(base_dir, sft_dir, tmp_path, flat):
    """Micro-batch 4 × 1 with packs; the second run takes every reference log-prob from the store."""
    kept = {"cache": str(tmp_path / "kept")}
    settings = {"dpo_plugin": {"compute": {"max_tokens": 150}, "reference": kept}}
    first = host.train(config(base_dir, sft_dir, tmp_path, "a", **settings), tmp_path / "a")
    second = host.train(config(base_dir, sft_dir, tmp_path, "b", **settings), tmp_path / "b")
    assert first.trainer.reference.forwards > second.trainer.reference.forwards == 0
    for run in (first, second):
        assert run.trainer.state.global_step == flat.trainer.state.global_step
        torch.testing.assert_close(curve(run), curve(flat), atol=2e-4, rtol=1e-4)


def test_what_a_loss_of_several_is_made_of_is_logged(base_dir, sft_dir, tmp_path):
    """DPO's own starts at ln 2, whatever is added to it; the sum is the loss, in training and evaluation."""
    data = config(base_dir, sft_dir, tmp_path, dpo_loss_type=["sigmoid", "sft"], dpo_loss_weights=[1.0, 0.5])
    data |= {
        "test_datasets": [{**data["datasets"][0], "split": "train"}],
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    history = host.train(data, tmp_path).trainer.state.log_history
    for prefix in ("", "eval_"):
        lines = [line for line in history if f"{prefix}loss" in line]
        parts = [(line[f"{prefix}loss/sigmoid"], line[f"{prefix}loss/sft"]) for line in lines]
        assert len(lines) > 1
        assert [line[f"{prefix}loss"] for line in lines] == pytest.approx([a + b / 2 for a, b in parts], abs=2e-4)
        nats = [-line[f"{prefix}logps/chosen"] / line[f"{prefix}lengths/chosen"] for line in lines]
        assert [b for _, b in parts] == pytest.approx(nats, rel=0.1)
        if not prefix:
            assert parts[0][0] == pytest.approx(math.log(2), abs=1e-4)


def test_evaluation_in_packs(base_dir, sft_dir, tmp_path):
    found = []
    for name, section in (("a", {}), ("b", compute(max_tokens=150))):
        data = config(base_dir, sft_dir, tmp_path, name, max_steps=1, **section)
        data |= {
            "test_datasets": [{**data["datasets"][0], "split": "train"}],
            "eval_strategy": "steps",
            "eval_steps": 1,
        }
        run = host.train(data, tmp_path / name)
        line = next(line for line in run.trainer.state.log_history if "eval_loss" in line)
        found.append(torch.tensor([line["eval_loss"], line["eval_rewards/margins"]]))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.core
def test_a_4_bit_run_goes_on_after_an_evaluation(base_dir, sft_dir, tmp_path):
    settings = {
        "adapter": "qlora",
        "load_in_4bit": True,
        "val_set_size": 0.25,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    run = host.train(config(base_dir, sft_dir, tmp_path, max_steps=3, **settings), tmp_path)
    evaluations = [line["eval_loss"] for line in run.trainer.state.log_history if "eval_loss" in line]
    assert len(run.lines) == 3
    assert len(evaluations) >= 3
    assert evaluations[-1] < evaluations[0]


@pytest.mark.core
def test_nf4_flat_pairs_equal_two_rows(base_dir):
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=quantised, dtype=torch.float32)
    attention.attend_to_pairs(model)
    keep_nf4_as_packed(model)
    assert_same(with_lora(model), batch_of(flat=True), batch_of(), 1e-4, 1e-4)


def test_a_fully_trained_model_is_saved_with_an_attention_that_others_know(base_dir, tmp_path):
    keys = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_model_dir", "adapter")
    settings = {**dict.fromkeys(keys), "learning_rate": 1e-4, "max_steps": 1}
    run = host.train(config(base_dir, None, tmp_path, **settings), tmp_path)
    assert run.trainer.data_collator.flat
    assert attention.NAME not in (run.output_dir / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(run.output_dir)
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("written", ["our section", "the host's key", "both"])
def test_ld_alpha_and_f_divergence_reach_the_loss(base_dir, sft_dir, tmp_path, flat, written):
    """The host's key is `dpo_ld_alpha`, which axolotl drops from a YAML up to 0.20."""
    own = {"ld_alpha": 0.5} if written != "the host's key" else {}
    theirs = {"dpo_ld_alpha": 0.5} if written != "our section" else {}
    section = {"dpo_plugin": {"loss": {"f_divergence": "forward_kl", **own}}, **theirs}
    run = host.train(config(base_dir, sft_dir, tmp_path, **section), tmp_path)
    options = run.trainer.preference_step.loss_options
    assert (options.f_divergence, options.ld_alpha) == ("forward_kl", 0.5)
    if "dpo_ld_alpha" in AxolotlInputConfig.model_fields:
        assert run.trainer.args.ld_alpha == theirs.get("dpo_ld_alpha")
    assert run.lines[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    rejected, chosen = (curve(run) - curve(flat))[0, 2:]
    assert rejected == 0  # the shorter side of each pair has no tail
    assert chosen > 1
    assert not torch.allclose(curve(run)[1:], curve(flat)[1:], atol=1e-4)


def test_a_pair_longer_than_max_tokens_is_named_before_the_first_step(base_dir, sft_dir, tmp_path):
    rows = [*ROWS[:5], chat_row("Long? " * 30, "Yes. " * 20, "No.", "novels")]
    with pytest.raises(
        DataError, match=r"row 6 of the training data of source 'novels' takes \d+ tokens.*max_tokens: 150"
    ):
        host.train(config(base_dir, sft_dir, tmp_path, rows=rows, **compute(max_tokens=150)), tmp_path)


def test_a_log_prob_that_is_not_finite_stops_the_run_and_names_the_row(tmp_path):
    base = save_base(tmp_path / "base")
    encode = tokenizer().encode
    chats = [row[side] for row in ROWS for side in ("chosen", "rejected")]
    others = {token for chat in chats for token in encode(tokenizer().apply_chat_template(chat, tokenize=False))}
    token = next(token for token in encode("ZZ! 77 %% mouse", add_special_tokens=False) if token not in others)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][token] = float("nan")
    settings = (base / "config.json").read_text()
    (base / "config.json").write_text(settings.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    rows = [*ROWS[:9], chat_row("A question?", "ZZ! 77 %% mouse", "A house.", "animals")]
    with pytest.raises(
        NotFiniteError,
        match=r"log-probability of chosen is nan at step \d+, for row 10 of the training .*'animals'\. 192 of \d+ values "
        r"of the base model's .*embed_tokens.weight are not finite, so it is the base model and not the row\. Write: base_m",
    ):
        host.train(config(base, None, tmp_path, rows=rows, lora_model_dir=None, max_steps=6), tmp_path)


def test_the_root_is_called_once_per_forward(base_dir, sft_dir, tmp_path, monkeypatch):
    """Engines gather in the root's hooks, so neither the backbone nor the head may be called beside it."""
    calls = []
    monkeypatch.setattr(
        "dpo_plugin.compute.step.run_model", lambda model, *rest: calls.append(model) or run_model(model, *rest)
    )
    run = host.train(config(base_dir, sft_dir, tmp_path, max_steps=1), tmp_path)
    assert all(model is run.trainer.model for model in calls)
    assert len(calls) == 4, "both layouts, to compare them, then policy and reference"
