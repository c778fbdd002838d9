"""``axolotl dpo audit`` on a tiny model: what it says, what it caches for the run, and the rows that it writes."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dpo_plugin.errors import ConfigError, DataError, DPOPluginError
from dpo_plugin.host.commands.audit import audit
from dpo_plugin.host.commands.cli import dpo
from dpo_plugin.model.cache import ReferenceLogpCache
from tests.support import host, tiny
from tests.support.tiny import chat_row, dpo_config, write_rows
from tests.unit.compute.test_layouts import hidden_prefix

TEXT = "How do I take a coffee stain out of a white cotton shirt"
ROWS = [
    chat_row(f"{TEXT}?", "Soak it.", "No.", "wash"),
    chat_row(f"{TEXT} !", "Use salt.", "No idea.", "wash"),  # nearly the prompt of row 1
    chat_row("Is it so?", "Yes, it is.", "No."),
    chat_row("Is it so?", "No.", "Yes, it is."),  # contradicts row 3
    {"chosen": "no prompt", "rejected": "at all"},  # left out by the data audit, and still counted
    chat_row("Where?", "Over there.", "Here."),
    chat_row("Where?", "Over there.", "Here."),  # a copy of row 6
    chat_row("When does the train leave?", "At noon, from track two.", "Late."),  # held out, too
    {**chat_row("Who?", "The cook.", "Nobody."), "score": 3},
]
HELD_OUT = [chat_row("When does the train leave?", "At noon.", "Never."), chat_row("What now?", "Rest.", "Run.")]


@pytest.fixture
def config(base_dir, sft_dir, tmp_path):
    """Write a config of these rows."""

    def write(rows=ROWS, held_out=HELD_OUT, name="config.yaml", kind="dpo_plugin.chat", **changes):
        entries = {
            key: [{"path": str(write_rows(tmp_path / f"{key}.jsonl", some)), "ds_type": "json", "type": kind}]
            for key, some in (("datasets", rows), ("test_datasets", held_out))
            if some
        }
        usual = {"lora_model_dir": str(sft_dir), "dpo_plugin": {"data": {"max_bad_rows": 0.5}}, **entries}
        made = dpo_config(base_dir, tmp_path / "out", **{**usual, **changes})
        (tmp_path / name).write_text(yaml.safe_dump(made))
        return tmp_path / name

    return write


@pytest.fixture
def no_model(monkeypatch):
    from axolotl.loaders.model import ModelLoader

    monkeypatch.setattr(ModelLoader, "load", lambda _: pytest.fail("a model was loaded"))


def written(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def rows_named(records):
    return [record["row"] for record in records]


@pytest.mark.usefixtures("no_model")
class TestTexts:
    def test_what_is_odd_is_counted_and_named_by_the_row_in_the_file(self, config):
        found = audit(config())
        assert (found["pairs"], found["held_out"], found["left_out"]) == (8, 2, {"malformed": 1})
        assert (found["same_prompt"], found["near_prompt"]) == (2, 1)
        assert (found["duplicates"], found["contradictions"], found["both_sides"]) == (1, 2, 0)
        assert (found["same_prompt_held_out"], found["near_prompt_held_out"]) == (1, 0)
        assert found["margins"] is found["kept"] is None
        assert [rows_named(group["rows"]) for group in found["repeated"]] == [[1, 2], [3, 4], [6, 7]]
        assert {one["row"]: one["reasons"] for one in found["suspects"]} == {
            3: ["contradicts datasets[0] row 4"],
            4: ["contradicts datasets[0] row 3"],
            7: ["the same pair as datasets[0] row 6"],
            8: ["the same prompt as held-out test_datasets[0] row 1"],
        }
        assert rows_named(found["suspects"]) == [3, 4, 8, 7]
        assert found["suspects"][0]["source"] == "made"

    def test_lengths_are_tokens_of_the_completions(self, config, tokenizer):
        found = audit(config(rows=[ROWS[0], ROWS[7]], held_out=None))
        gaps = [
            len(tokenizer(row["chosen"][-1]["content"])["input_ids"])
            - len(tokenizer(row["rejected"][-1]["content"])["input_ids"])
            for row in (ROWS[0], ROWS[7])
        ]
        assert found["length_gap"]["mean"] == sum(gaps) / 2
        assert found["length_gap"]["chosen_longer"] == 1

    def test_without_weights_the_command_prints_it(self, config, base_dir, tmp_path):
        weightless = shutil.copytree(base_dir, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
        result = CliRunner().invoke(dpo, ["audit", str(config(base_model=str(weightless))), "--rows", "2"])
        assert result.exit_code == 0, result.output
        assert "8 training pairs, 2 held out; left out by the data audit: malformed 1" in result.stdout
        assert "2 the same, 1 nearly the same" in result.stdout
        assert "held out, too: 1 with the same, 0 with nearly the same" in result.stdout
        assert "datasets[0] row 3" in result.stdout
        assert "--reference computes them" in result.stdout
        assert "row 8" not in result.stdout

    def test_json_alone_is_printed(self, config):
        result = CliRunner().invoke(dpo, ["audit", str(config()), "--json"])
        assert json.loads(result.stdout) == audit(config())

    def test_without_datasketch_it_says_what_to_install(self, config, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "datasketch", None)
        result = CliRunner().invoke(dpo, ["audit", str(config())])
        assert result.exit_code == 0, result.output
        assert "were not looked for, which takes: pip install 'dpo-plugin[audit]'" in result.stdout
        assert "2 the same\n" in result.stdout
        assert audit(config())["near_prompt"] is None
        with pytest.raises(ConfigError, match="nearly the same, too, which takes: pip install 'dpo-plugin"):
            audit(config(), keep="unique", out=str(tmp_path / "o.jsonl"))
        assert audit(config(), keep="consistent", out=str(tmp_path / "o.jsonl"))["kept"]["rows"] == 6

    def test_val_set_size_holds_out_the_rows_that_the_run_holds_out(self, config):
        rows = [chat_row(f"{word}?", "Good.", "Bad.") for word in ("Who", "Which", "Whose", "When", "Where", "Why")]
        file = config(rows=[*rows, *rows[:2]], held_out=None, val_set_size=0.25)
        from dpo_plugin.host.commands.config_file import load_config
        from dpo_plugin.host.datasets import load_datasets

        data = load_datasets(*load_config(yaml.safe_load(file.read_text())))
        found = audit(file, rows=100)
        assert (found["pairs"], found["held_out"]) == (6, 2)
        train, test = ([tuple(ids) for ids in part["prompt_ids"]] for part in (data.train_dataset, data.eval_dataset))
        assert found["same_prompt_held_out"] == sum(prompt in test for prompt in train)
        assert found["same_prompt"] == len(train) - len(set(train))

    def test_several_data_sets_are_told_apart(self, config, tmp_path):
        file = config()
        made = yaml.safe_load(file.read_text())
        more = write_rows(tmp_path / "more.jsonl", [chat_row("Is it so?", "Perhaps.", "Never.")])
        made["datasets"].append({**made["datasets"][0], "path": str(more)})
        file.write_text(yaml.safe_dump(made))
        found = audit(file, keep="unique", out=str(tmp_path / "o.jsonl"))
        group = next(group for group in found["repeated"] if group["excerpt"] == "Is it so?")
        assert [(one["where"], one["row"]) for one in group["rows"]] == [
            ("datasets[0]", 3),
            ("datasets[0]", 4),
            ("datasets[1]", 1),
        ]
        assert found["kept"]["rows"] == 5


@pytest.mark.usefixtures("no_model")
class TestKeep:
    def test_rows_are_written_as_they_were(self, config, tmp_path):
        out = tmp_path / "kept.jsonl"
        found = audit(config(), keep="unique,consistent,new", out=str(out))
        assert written(out) == [ROWS[0], ROWS[5], ROWS[8]]
        assert found["kept"] == {
            "rows": 3,
            "dropped": {"unique": 2, "consistent": 2, "new": 1},
            "out": str(out),
            "type": "dpo_plugin.chat",
        }
        assert not [file for file in tmp_path.iterdir() if file.name.endswith(".part")]

    def test_the_command_counts_what_each_rule_dropped(self, config, tmp_path):
        words = ["audit", str(config()), "--keep", "consistent", "--out", str(tmp_path / "kept.jsonl")]
        result = CliRunner().invoke(dpo, words)
        assert result.exit_code == 0, result.output
        said = f"kept 6 of 8 pairs (consistent dropped 2): {tmp_path / 'kept.jsonl'}, type: dpo_plugin.chat"
        assert said in result.stdout

    def test_what_is_kept_is_sound(self, config, tmp_path):
        """Audited again, nothing is left to find, and rows of another shape have become messages."""
        renamed = [
            {"best": row.get("chosen"), "worst": row.get("rejected"), "source": row.get("source")} for row in ROWS
        ]
        columns = {"data": {"max_bad_rows": 0.5, "columns": {"chosen": "best", "rejected": "worst"}}}
        held_out = [{"best": row["chosen"], "worst": row["rejected"]} for row in HELD_OUT]
        file = config(renamed, held_out, dpo_plugin=columns)
        audit(file, keep="unique,consistent,new", out=str(tmp_path / "kept.jsonl"))
        again = audit(config(rows=written(tmp_path / "kept.jsonl")))
        assert (again["pairs"], again["left_out"], again["suspects"], again["repeated"]) == (3, {}, [], [])

    def test_rendered_text_stays_text(self, config, tmp_path):
        rows = [{"prompt": f"Q{n}: ", "chosen": "yes", "rejected": "no", "n": n} for n in range(3)]
        found = audit(config(rows, None, kind="dpo_plugin.text"), keep="consistent", out=str(tmp_path / "o.jsonl"))
        assert written(tmp_path / "o.jsonl") == rows
        assert found["kept"]["type"] == "dpo_plugin.text"

    def test_text_and_messages_do_not_mix(self, config, tmp_path):
        file = config(held_out=None)
        made = yaml.safe_load(file.read_text())
        more = write_rows(tmp_path / "more.jsonl", [{"prompt": "Q: ", "chosen": "yes", "rejected": "no"}])
        made["datasets"].append({"path": str(more), "ds_type": "json", "type": "dpo_plugin.text"})
        file.write_text(yaml.safe_dump(made))
        with pytest.raises(DataError, match="cannot stand in one file. Write: a config for each"):
            audit(file, keep="consistent", out=str(tmp_path / "o.jsonl"))
        assert not [one for one in tmp_path.iterdir() if one.name.startswith("o.jsonl")]

    def test_nothing_left_is_an_error(self, config, tmp_path):
        with pytest.raises(DataError, match=r"no row is left of 2 \(consistent dropped 2\)"):
            audit(config(rows=ROWS[2:4]), keep="consistent", out=str(tmp_path / "o.jsonl"))
        assert not (tmp_path / "o.jsonl").exists()

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"keep": "unique"}, "Write, too: --out <file>"),
            ({"out": "o.jsonl"}, "Write, too: --keep unique"),
            ({"keep": "uniq", "out": "o.jsonl"}, "unknown rule 'uniq'. Known: unique, consistent, new, margin"),
            ({"keep": "margin:0..", "out": "o.jsonl"}, "Write, too: --reference"),
            ({"keep": "unique", "out": "there.jsonl"}, "`--out there.jsonl` exists. Write: --out <another"),
            ({"keep": "unique", "out": "no/o.jsonl"}, "is in a folder that does not exist"),
        ],
    )
    def test_options_are_refused_before_data_is_read(self, config, tmp_path, monkeypatch, options, says):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "there.jsonl").write_text("mine")
        with pytest.raises(ConfigError, match=says):
            audit(config(), **options)
        assert not (tmp_path / "prepared").exists()
        assert (tmp_path / "there.jsonl").read_text() == "mine"

    def test_new_needs_held_out_data(self, config, tmp_path):
        with pytest.raises(ConfigError, match="`--keep new` is about held-out data.*Write: val_set_size"):
            audit(config(held_out=None), keep="new", out=str(tmp_path / "o.jsonl"))

    def test_a_reference_that_is_no_model_has_no_margins(self, config):
        with pytest.raises(ConfigError, match="'none' has no model. Leave out --reference"):
            audit(config(dpo_plugin={"reference": {"strategy": "none"}}), reference=True)


def log_prob(model, tokenizer, row, side):
    """Log-probability of an answer in nats by PEFT alone, and its tokens."""
    prompt, whole = (
        tokenizer.apply_chat_template(chat, add_generation_prompt=generate, tokenize=False)
        for chat, generate in ((row[side][:-1], True), (row[side], False))
    )
    before = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(whole.rstrip("\n"), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logps = model(ids).logits.log_softmax(-1)[0, before - 1 : -1]
    answer = ids[0, before:]
    return logps[range(len(answer)), answer].sum().item(), len(answer)


class TestReference:
    SOUND = tuple(row for row in ROWS if "prompt" in row)

    def test_margins_are_those_of_plain_peft(self, config, base_dir, sft_dir, tokenizer, tmp_path):
        found = audit(config(), reference=True, rows=20, keep="margin:0..", out=str(tmp_path / "o.jsonl"))
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), str(sft_dir)).eval()
        lowest = found["margins"]["lowest"]
        assert len(lowest) == 8
        per_token = {}
        for record in lowest:
            row = ROWS[record["row"] - 1]
            (one, tokens), (other, others) = (log_prob(model, tokenizer, row, side) for side in ("chosen", "rejected"))
            assert (record["chosen_tokens"], record["rejected_tokens"]) == (tokens, others)
            assert record["nats"] == pytest.approx(one - other, abs=1e-3)
            assert record["nats_per_token"] == pytest.approx(one / tokens - other / others, abs=1e-3)
            per_token[record["row"]] = record["nats_per_token"]
        assert [*per_token.values()] == sorted(per_token.values())
        assert rows_named(found["margins"]["highest"])[0] == max(per_token, key=per_token.get)
        kept = [n for n, value in sorted(per_token.items()) if value >= 0]
        assert written(tmp_path / "o.jsonl") == [ROWS[n - 1] for n in kept]
        assert found["kept"]["dropped"] == {"margin": 8 - len(kept)}
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("compute", [{}, {"max_tokens": 400, "prefix_sharing": False}])
    def test_the_run_reads_what_it_has_cached(self, config, tmp_path, compute):
        file = config(rows=list(self.SOUND), dpo_plugin={"compute": compute}, num_epochs=1, max_steps=2)
        first = audit(file, reference=True)
        run = host.train(yaml.safe_load(file.read_text()), tmp_path / "run")
        assert run.trainer.reference.forwards == 0
        assert run.lines[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
        assert audit(file, reference=True)["margins"] == first["margins"]

    def test_margins_are_right_where_a_flat_row_would_not_be(self, config, tmp_path, monkeypatch):
        """As in a run, two rows are taken where a flat one hides the prefix from an answer."""
        right = audit(config(), reference=True)["margins"]
        hidden_prefix(monkeypatch)
        found = audit(config(dataset_prepared_path=str(tmp_path / "fresh")), reference=True)["margins"]
        assert rows_named(found["lowest"]) == rows_named(right["lowest"])
        for one, other in zip(found["lowest"], right["lowest"], strict=True):
            assert one["nats"] == pytest.approx(other["nats"], abs=1e-3)

    def test_another_reference_is_computed_anew(self, config, base_dir, tmp_path):
        """Its margins are its own, though all rows of the first one are cached in the same folder."""
        first = audit(config(), reference=True)["margins"]
        other = tiny.save_adapter(base_dir, tmp_path / "other", seed=9)
        second = audit(config(lora_model_dir=str(other)), reference=True)["margins"]
        assert len(list((tmp_path / "prepared/reference_logps").iterdir())) == 2
        assert first["nats"] != second["nats"]
        elsewhere = str(tmp_path / "fresh")
        fresh = audit(config(lora_model_dir=str(other), dataset_prepared_path=elsewhere), reference=True)["margins"]
        assert fresh == second

    def test_numbers_of_another_model_under_the_same_key_are_found_out(self, config, tmp_path):
        """As after weights were changed between the samples that the key is made of."""
        first = audit(config(), reference=True)["margins"]
        (folder,) = (tmp_path / "prepared/reference_logps").iterdir()
        right = ReferenceLogpCache(folder.parent, folder.name)
        for file in folder.iterdir():
            file.unlink()
        wrong = ReferenceLogpCache(folder.parent, folder.name)
        wrong.put(list(right._values), torch.tensor([*right._values.values()]) - torch.tensor([5.0, 0.0]))
        wrong.flush()
        assert audit(config(), reference=True)["margins"] == first

    @pytest.mark.slow
    def test_without_adapter_it_is_the_base(self, config, base_dir, tokenizer):
        found = audit(config(adapter=None, lora_model_dir=None), reference=True, rows=1)
        (record,) = found["margins"]["lowest"]
        model = AutoModelForCausalLM.from_pretrained(base_dir).eval()
        one, other = (log_prob(model, tokenizer, ROWS[record["row"] - 1], side)[0] for side in ("chosen", "rejected"))
        assert record["nats"] == pytest.approx(one - other, abs=1e-3)

    def test_log_probs_that_are_not_finite_name_the_row(self, config, monkeypatch):
        from dpo_plugin.host.commands import audit as command

        theirs = command.reference_logps
        monkeypatch.setattr(
            command, "reference_logps", lambda *given: dict.fromkeys(theirs(*given), (float("nan"), -1.0))
        )
        with pytest.raises(DPOPluginError, match=r"log-probabilities of datasets\[0\] row 1 are \(nan"):
            audit(config(), reference=True)
