"""``axolotl dpo pairs`` on a tiny model: what it writes, that it goes on after a kill, and two rounds of training."""

import json
import signal
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_plugin.errors import ConfigError, DataError, DPOPluginError, ScorerError
from dpo_plugin.host.commands.cli import dpo
from dpo_plugin.host.commands.pairs import pairs
from tests.support import forked, host, tiny
from tests.support.tiny import dpo_config

PROMPTS = [{"prompt": f"Question {n}?", "source": "ab"[n % 2], "n": n} for n in range(6)]
STOPS = list(range(1, 2048, 2))
"""Half of the vocabulary ends an answer, so that random models do."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny.save_base(tmp_path_factory.mktemp("base"))
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    config.initializer_range = 0.2  # with smaller weights a random model repeats one token
    config.eos_token_id = [config.eos_token_id, *STOPS]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sft(base, tmp_path_factory):
    return tiny.save_adapter(base, tmp_path_factory.mktemp("sft"))


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return str(file)


@pytest.fixture
def config(base, sft, tmp_path):
    """Write a config whose data does not exist yet."""

    def write(name="config.yaml", section=(), **changes):
        own = {"scorer": "length", "max_new_tokens": 24, "batch_size": 8, **dict(section)}
        data = [{"path": str(tmp_path / "pairs.jsonl"), "ds_type": "json", "type": "dpo_plugin.chat"}]
        usual = {"lora_model_dir": str(sft), "datasets": data, "dpo_plugin": {"pairs": own}}
        made = {**dpo_config(base, tmp_path / "out"), **usual, **changes}
        (tmp_path / name).write_text(yaml.safe_dump(made))
        return tmp_path / name

    return write


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


class TestWhatIsWritten:
    def test_greedy_answers_are_those_of_plain_peft(self, config, prompts, base, sft, tmp_path):
        found = pairs(config(section={"temperature": 0, "answers": 1}), tmp_path / "o.jsonl", prompts,
                      models=["policy", "base"])  # fmt: skip
        load, tokenizer = AutoModelForCausalLM.from_pretrained, tiny.tokenizer()
        models = {"policy": PeftModel.from_pretrained(load(base), str(sft)).eval(), "base": load(base).eval()}
        kept = rows_of(tmp_path / "o.jsonl.answers.jsonl")[1:]
        for row, answers in zip(PROMPTS, kept, strict=True):
            chat = [{"role": "user", "content": row["prompt"]}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            assert [answer["model"] for answer in answers] == ["policy", "base"]
            for answer in answers:
                with torch.no_grad():
                    whole = models[answer["model"]].generate(**ids, do_sample=False, max_new_tokens=24)[0]
                new = whole[ids["input_ids"].shape[1] :]
                assert answer["text"] == tokenizer.decode(new, skip_special_tokens=True).strip()
                assert answer["score"] == len(answer["text"])
                assert answer["ended"] == (int(new[-1]) in [*STOPS, tokenizer.eos_token_id])
        assert found.counts["pairs"] == len(rows_of(tmp_path / "o.jsonl"))
        assert found.models == {"policy": str(sft), "base": str(base)}

    def test_the_command_prints_what_became_of_the_prompts(self, config, prompts, tmp_path, sft):
        words = ["pairs", str(config()), "--prompts", prompts, "--out", str(tmp_path / "o.jsonl")]
        result = CliRunner().invoke(dpo, words)
        assert result.exit_code == 0, result.output
        assert f"policy: {sft}" in result.stdout
        assert f"pairs: {tmp_path / 'o.jsonl'}" in result.stdout
        again = CliRunner().invoke(dpo, [*words, "--json"])
        assert again.exit_code == 0, again.output
        assert json.loads(again.stdout)["counts"]["pairs"] == len(rows_of(tmp_path / "o.jsonl"))
        row = rows_of(tmp_path / "o.jsonl")[0]
        assert row["chosen_score"] > row["rejected_score"]
        assert row["source"] in "ab"
        assert row["seed"] == 42
        assert row["chosen_weights"].startswith("sha256:")

    def test_answers_of_another_program_are_scored_without_a_model(self, config, tmp_path, monkeypatch):
        from axolotl.loaders.model import ModelLoader

        monkeypatch.setattr(ModelLoader, "load", lambda _: pytest.fail("a model was loaded"))
        given = [
            {"prompt": "Why?", "answers": ["Yes, so.", "Yes so"], "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
            {"messages": [{"role": "user", "content": "No?"}], "answers": ["a", "a"], "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        ]  # fmt: skip
        (tmp_path / "theirs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
        found = pairs(config(section={"scorer": "rule"}), tmp_path / "o.jsonl", answers=str(tmp_path / "theirs.jsonl"))
        (row,) = rows_of(tmp_path / "o.jsonl")
        assert [row[side][-1]["content"] for side in ("chosen", "rejected")] == ["Yes so", "Yes, so."]
        assert found.counts == {"pairs": 1, "answers repeated": 1, "too few answers": 1}
        assert (found.chosen, found.rejected, found.score) == (1, 0, 0.75)

    def test_another_gap_makes_other_pairs_of_the_same_answers(self, config, prompts, tmp_path, monkeypatch):
        from axolotl.loaders.model import ModelLoader

        first = pairs(config(), tmp_path / "o.jsonl", prompts)
        monkeypatch.setattr(ModelLoader, "load", lambda _: pytest.fail("a model was loaded"))
        second = pairs(config(section={"gap": first.chosen - first.rejected}), tmp_path / "o.jsonl", prompts)
        assert 0 < second.counts["pairs"] < first.counts["pairs"]
        with pytest.raises(ConfigError, match="made otherwise: temperature differs"):
            pairs(config(section={"temperature": 0.5}), tmp_path / "o.jsonl", prompts)


KILLED = """
import os, signal, sys
from dpo_plugin.samples import pairing
append, left = pairing.AnswersFile.append, [int(sys.argv[4])]
def appended(self, answers):
    append(self, answers)
    left[0] -= 1
    if not left[0]:
        with self.path.open("ab") as handle:
            handle.write(b'[{"text": "half a li')
        os.kill(os.getpid(), signal.SIGKILL)
pairing.AnswersFile.append = appended
from dpo_plugin.host.commands.pairs import pairs
pairs(sys.argv[1], sys.argv[2], sys.argv[3], models=["policy", "reference"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_killed_and_started_again_it_writes_the_same_bytes(config, prompts, base, tmp_path, temperature):
    trained = tiny.save_adapter(base, tmp_path / "out", seed=7)  # so that policy and reference differ
    section = {"temperature": temperature, "answers": 2, "batch_size": 8}
    file = config(section=section, output_dir=str(trained))
    pairs(file, tmp_path / "whole.jsonl", prompts, models=["policy", "reference"])
    for batches in (1, 2):
        out = tmp_path / f"killed-{batches}.jsonl"
        words = [sys.executable, "-c", KILLED, str(file), str(out), prompts, str(batches)]
        done = forked.run(words)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        assert not out.exists()
        pairs(file, out, prompts, models=["policy", "reference"])
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        kept = [tmp_path / f"{name}.jsonl.answers.jsonl" for name in (out.stem, "whole")]
        assert kept[0].read_bytes() == kept[1].read_bytes()
    drawn = [row["chosen"][-1]["content"] for row in rows_of(tmp_path / "whole.jsonl")]
    assert len(set(drawn)) > 1


@pytest.mark.slow
def test_two_rounds(config, prompts, sft, tmp_path):
    """Each round's policy starts from the last one's, which is its reference, too."""
    start = str(sft)
    for number in (1, 2):
        out, file = tmp_path / f"round-{number}", tmp_path / f"pairs-{number}.jsonl"
        data = [{"path": str(file), "ds_type": "json", "type": "dpo_plugin.chat"}]
        settings = {"output_dir": str(out), "lora_model_dir": start, "datasets": data, "num_epochs": 1}
        yaml_file = config(f"round-{number}.yaml", **settings)
        made = pairs(yaml_file, file, prompts)
        assert made.models == {"policy": start}
        assert {row["chosen_weights"] for row in rows_of(file)} == {row["rejected_weights"] for row in rows_of(file)}
        run = host.train(yaml.safe_load(yaml_file.read_text()), tmp_path / f"run-{number}")
        assert run.lines[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
        start = str(out)
    weights = [{row["chosen_weights"] for row in rows_of(tmp_path / f"pairs-{n}.jsonl")} for n in (1, 2)]
    assert weights[0] != weights[1]


class TestBadInput:
    @pytest.mark.parametrize(
        ("text", "section", "kind", "says"),
        [
            ("", {}, ConfigError, "`--prompts .*` is empty"),
            ('{"question": "x"}\n', {}, ConfigError, "line 1 has neither a prompt"),
            ('{"prompt": "' + "word " * 3000 + '"}\n', {}, ConfigError, r"prompt 1 has \d+ tokens.*context of 2048. Write"),
            ('{"prompt": "x"}\n', {"scorer": "rul"}, ConfigError, "names the scorer 'rul'.*Write: .*scorer: rule"),
            ('{"prompt": "x"}\n', {"scorer": "command"}, ConfigError, "needs a program"),
            ('{"prompt": "x"}\n', {"answers": 0}, ConfigError, "answers"),
        ],
    )  # fmt: skip
    def test_is_refused_before_a_model_is_loaded(self, config, tmp_path, monkeypatch, text, section, kind, says):
        from axolotl.loaders.model import ModelLoader

        monkeypatch.setattr(ModelLoader, "load", lambda _: pytest.fail("a model was loaded"))
        (tmp_path / "p.jsonl").write_text(text)
        with pytest.raises(kind, match=says):
            pairs(config(section=section), tmp_path / "o.jsonl", str(tmp_path / "p.jsonl"))
        assert not (tmp_path / "o.jsonl.answers.jsonl").exists()

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({}, "either --prompts or --answers"),
            ({"prompts": "p.txt", "answers": "p.txt"}, "either --prompts or --answers"),
            ({"prompts": "none.txt"}, "`--prompts none.txt` does not exist"),
            ({"checkpoint": "nowhere"}, "`--checkpoint nowhere` holds no adapter_config.json"),
            ({"out": "p.txt"}, "exists and was not made by this command. Write: --out <another"),
            ({"answers": "p.txt", "prompts": None}, "prompt 1 has no answers"),
        ],
    )
    def test_options(self, config, tmp_path, monkeypatch, options, says):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "p.txt").write_text("Why?\n")
        usual = {"out": "o.jsonl"} if not options or "answers" in options else {"out": "o.jsonl", "prompts": "p.txt"}
        with pytest.raises(DPOPluginError, match=says):
            pairs(config(), **{**usual, **options})

    def test_a_scorer_that_fails_leaves_what_was_scored(self, config, prompts, tmp_path):
        program = tmp_path / "score.py"
        program.write_text("import sys\nlines = sys.stdin.read()\nif 'Question 4' in lines: sys.exit(9)\n"
                           "print('\\n'.join(str(len(line)) for line in lines.splitlines()))")  # fmt: skip
        section = {"scorer": "command", "command": f"{sys.executable} {program}"}
        with pytest.raises(ScorerError, match="ended with 9"):
            pairs(config(section=section), tmp_path / "o.jsonl", prompts)
        assert len(rows_of(tmp_path / "o.jsonl.answers.jsonl")) == 1 + 4
        program.write_text(program.read_text().replace("Question 4", "nothing"))
        assert pairs(config(section=section), tmp_path / "o.jsonl", prompts).counts["pairs"] > 0

    def test_no_pair_is_an_error_that_counts(self, config, prompts, tmp_path):
        with pytest.raises(DataError, match=r"no pair came of 6 prompts \(.*6 too few answers\).*Write: temperature"):
            pairs(config(section={"answers": 1}), tmp_path / "o.jsonl", prompts)
        assert not (tmp_path / "o.jsonl").exists()
