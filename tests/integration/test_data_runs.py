"""Data through axolotl's config: which rows reach the trainer, as which tokens."""

import json
import shutil
import sys

import pytest

from dpo_plugin.data.prepare import Preparation
from dpo_plugin.errors import ConfigError, DataError
from tests.support import forked, host
from tests.support.tiny import ROOT, chat_row, dpo_config, write_rows


def prepare(base_dir, folder, *entries, **settings):
    from axolotl.integrations.base import PluginManager

    folder.mkdir(parents=True, exist_ok=True)
    data = [{"ds_type": "json", "type": "dpo_plugin.chat", **entry} for entry in entries]
    cfg = host.load_config(
        dpo_config(base_dir, folder / "out", datasets=data, shuffle_merged_datasets=False, **settings), folder
    )
    return PluginManager.get_instance().load_datasets(cfg, preprocess=False)


def chosen(data, tokenizer):
    return [tokenizer.decode(ids) for ids in data["chosen_ids"]]


@pytest.mark.parametrize("kind", ["chat_template.argilla_chat", "dpo_plugin.chat", "dpo_plugin.conversations"])
@pytest.mark.parametrize("answer", ["a", "user", "You", " Paris.", "Paris.\n"])
def test_short_answers_come_out_whole_also_of_the_hosts_type(base_dir, tmp_path, tokenizer, kind, answer):
    file = write_rows(tmp_path / "rows.jsonl", [chat_row("What?", answer, "no idea")])
    data = prepare(base_dir, tmp_path, {"path": str(file), "type": kind}).train_dataset
    assert chosen(data, tokenizer) == [f"{answer}<|im_end|>"]


def test_the_hosts_default_type_reads_messages_and_the_last_message_of_an_answer(base_dir, tmp_path, tokenizer):
    ask = {"role": "user", "content": "What?"}
    row = {
        "messages": [ask],
        "chosen": {"role": "assistant", "content": "a"},
        "rejected": [ask, {"role": "assistant", "content": "b"}],
    }
    file = write_rows(tmp_path / "rows.jsonl", [row])
    data = prepare(base_dir, tmp_path, {"path": str(file), "type": "chat_template.default"}).train_dataset
    assert chosen(data, tokenizer) == ["a<|im_end|>"]
    assert tokenizer.decode(data["rejected_ids"][0]) == "b<|im_end|>"


def test_keys_of_the_entry_that_the_hosts_schema_drops_are_kept(base_dir, tmp_path, tokenizer):
    row = {
        "best": [{"who": "visitor", "says": "Hi?"}, {"who": "desk", "says": "Yes."}],
        "worst": [{"who": "visitor", "says": "Hi?"}, {"who": "desk", "says": "No."}],
    }
    file = write_rows(tmp_path / "rows.jsonl", [row])
    entry = {
        "path": str(file), "type": "chat_template.argilla_chat", "field_chosen": "best", "field_rejected": "worst",
        "message_property_mappings": {"role": "who", "content": "says"}, "roles": {"user": ["visitor"], "assistant": ["desk"]},
        "chat_template": "chatml",
    }  # fmt: skip
    data = prepare(base_dir, tmp_path, entry).train_dataset
    assert chosen(data, tokenizer) == ["Yes.<|im_end|>"]
    assert "Alibaba" not in tokenizer.decode(data["prompt_ids"][0])  # chatml has no default system message


def test_columns_and_roles_of_our_section(base_dir, tmp_path, tokenizer):
    row = {"ask": [{"role": "visitor", "content": "Hi?"}], "good": "Yes.", "bad": "No.", "set": "x"}
    file = write_rows(tmp_path / "rows.jsonl", [row])
    section = {
        "data": {
            "columns": {"prompt": "ask", "chosen": "good", "rejected": "bad", "source": "set"},
            "roles": {"visitor": "user"},
        }
    }
    data = prepare(base_dir, tmp_path, {"path": str(file)}, dpo_plugin=section).train_dataset
    assert chosen(data, tokenizer) == ["Yes.<|im_end|>"]
    assert data["source"][:] == ["x"]


def test_sets_of_different_shapes_are_mixed_and_tests_are_read_by_their_own_entry(base_dir, tmp_path, tokenizer):
    first = write_rows(tmp_path / "a.jsonl", [chat_row("q", "from a", "x")])
    second = write_rows(tmp_path / "b.jsonl", [{"prompt": "q", "chosen": "from b", "rejected": "x"}])
    third = write_rows(tmp_path / "c.jsonl", [{"system": "", "question": "q", "chosen": "from c", "rejected": "x"}])
    test = [{"path": str(third), "ds_type": "json", "type": "dpo_plugin.question"}]
    entries = [
        {"path": str(first), "type": "dpo_plugin.conversations"},
        {"path": str(second), "type": "dpo_plugin.prompt"},
    ]
    meta = prepare(base_dir, tmp_path, *entries, test_datasets=test)
    assert chosen(meta.train_dataset, tokenizer) == ["from a<|im_end|>", "from b<|im_end|>"]
    assert chosen(meta.eval_dataset, tokenizer) == ["from c<|im_end|>"]


def test_a_share_of_the_set_can_be_held_out(base_dir, tmp_path):
    meta = prepare(base_dir, tmp_path, {"path": str(ROOT / "recipes/data/preferences.jsonl")}, val_set_size=0.25)
    assert (len(meta.train_dataset), len(meta.eval_dataset)) == (198, 66)
    assert not set(meta.train_dataset["row"]) & set(meta.eval_dataset["row"])


def test_a_changed_learning_rate_prepares_nothing_and_a_changed_file_everything(
    base_dir, tmp_path, tokenizer, monkeypatch
):
    file = write_rows(tmp_path / "rows.jsonl", [chat_row("q", "first", "x")])
    prepare(base_dir, tmp_path, {"path": str(file)}, learning_rate=1e-5)
    runs = []
    plain = Preparation.batches
    monkeypatch.setattr(Preparation, "batches", lambda self, audit: runs.append(1) or plain(self, audit))
    prepare(base_dir, tmp_path, {"path": str(file)}, learning_rate=3e-5, rl_beta=0.3, seed=7, micro_batch_size=2)
    assert not runs
    write_rows(file, [chat_row("q", "other", "x")])
    data = prepare(base_dir, tmp_path, {"path": str(file)}).train_dataset
    assert runs
    assert chosen(data, tokenizer) == ["other<|im_end|>"]


def test_the_audit_is_saved_and_says_what_was_read(base_dir, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [*[chat_row("q", f"a{n}", "b") for n in range(20)], {"chosen": 1}])
    prepare(base_dir, tmp_path, {"path": str(file)})
    (audit,) = json.loads((tmp_path / "out/data_audit.json").read_text())["datasets"]
    assert (audit["read"], audit["kept"], audit["left_out"], audit["formats"]) == (
        21,
        20,
        {"malformed": 1},
        {"conversations": 20},
    )
    assert audit["examples"] == [{"row": 21, "reason": "malformed", "message": "`rejected` is missing"}]
    assert audit["lengths"]["prompt"]["p50"] > 0


def test_a_length_that_no_completion_survives_stops_before_the_model(base_dir, tmp_path):
    with pytest.raises(
        DataError, match=r"no completion token survives.*95 % of the pairs fit in 110 tokens.*sequence_len: 110"
    ):
        prepare(base_dir, tmp_path, {"path": str(ROOT / "recipes/data/preferences.jsonl")}, sequence_len=32)


def test_other_host_types_are_left_to_the_host_and_train(base_dir, sft_dir, tmp_path):
    rows = [{"system": "", "question": f"q{n}", "chosen": "yes, of course", "rejected": "no"} for n in range(8)]
    data = [{"path": str(write_rows(tmp_path / "rows.jsonl", rows)), "ds_type": "json", "type": "chatml.intel"}]
    settings = {
        "datasets": data,
        "lora_model_dir": str(sft_dir),
        "max_steps": 1,
        "save_strategy": "no",
        "save_steps": None,
    }
    run = host.train(dpo_config(base_dir, tmp_path / "out", **settings), tmp_path)
    assert run.lines[0]["loss"] == pytest.approx(0.693147, abs=1e-4)


@pytest.mark.parametrize(
    ("kinds", "settings", "says"),
    [
        (["prompt", "chatml.intel"], {}, r"`type: chatml.intel` is read by axolotl alone. Write: type: dpo_plugin.chat$"),
        (["prompt"], {"skip_prepare_dataset": True}, r"cannot read `type: dpo_plugin.prompt`.*Write: skip_prepare_dataset: false$"),
    ],
)  # fmt: skip
def test_what_the_host_prepares_is_not_mixed_with_our_formats(base_dir, tmp_path, kinds, settings, says):
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "q", "system": "", "question": "q", "chosen": "a", "rejected": "b"}]
    )
    entries = [{"path": str(rows), "type": kind if "." in kind else f"dpo_plugin.{kind}"} for kind in kinds]
    with pytest.raises(ConfigError, match=says):
        prepare(base_dir, tmp_path, *entries, **settings)


@pytest.mark.parametrize("multiple", [None, 64])
def test_sources_and_padding_reach_the_batch(base_dir, sft_dir, tmp_path, multiple):
    settings = {
        "lora_model_dir": str(sft_dir),
        "max_steps": 1,
        "save_strategy": "no",
        "save_steps": None,
        "pad_to_multiple_of": multiple,
    }
    run = host.train(dpo_config(base_dir, tmp_path / "out", **settings), tmp_path)
    batch = next(iter(run.trainer.get_train_dataloader()))
    assert len(batch["sources"]) == 4
    assert set(batch["sources"]) <= {"help_desk", "kitchen", "travel", "science"}
    assert multiple is None or batch["input_ids"].shape[1] % multiple == 0
    assert run.lines[0]["loss"] == pytest.approx(0.693147, abs=1e-4)


def test_preview_shows_pairs_and_audit_without_a_model(base_dir, tmp_path):
    import yaml

    file = tmp_path / "config.yaml"
    rows = write_rows(tmp_path / "rows.jsonl", [chat_row("What?", "word " * 50, "no")])
    data = [{"path": str(rows), "ds_type": "json", "type": "dpo_plugin.chat"}]
    weightless = shutil.copytree(base_dir, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    config = dpo_config(weightless, tmp_path / "out", datasets=data, sequence_len=80, excess_length_strategy="truncate")
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "dpo_plugin", "preview", str(file), "--rows", "5"]  # more than there are
    printed, shown = forked.run([*command, "--json"]), forked.run(command)
    assert printed.returncode == shown.returncode == 0
    told = json.loads(printed.stdout)
    (pair,) = told["pairs"]
    assert pair["chosen"]["text"].endswith("<|im_end|>")
    assert pair["chosen"]["cut_tokens"] > 0
    assert pair["prompt"]["tokens"] + pair["chosen"]["tokens"] == 80
    assert told["audit"][0]["cut"] == 1
    assert "[chosen]" in shown.stdout
    assert f"✂ {pair['chosen']['cut_tokens']} tokens cut" in shown.stdout
    assert "data audit" in shown.stdout
