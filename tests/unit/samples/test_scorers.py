"""Scorers: IFEval's rules by hand-made answers, programs and reward models that fail, and what is said then."""

import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from dpo_plugin.config import PairsConfig
from dpo_plugin.errors import ConfigError, DPOPluginError, ScorerError
from dpo_plugin.registry import get_registry
from dpo_plugin.samples.scorers import BatchScorer, Candidate, CheckedScorer
from tests.support import tiny


def scored(name, candidates, registered=None, **options):
    found = registered or get_registry().scorers[name]
    return CheckedScorer.make(name, found, PairsConfig(scorer=name, **options))(candidates)


def asked(answer, prompt="Why?", **row):
    return Candidate(prompt, answer, row)


def told(name, **arguments):
    return {"instruction_id_list": [name], "kwargs": [arguments]}


FEW = told("length_constraints:number_words", relation="less than", num_words=4)


class TestRule:
    @pytest.mark.parametrize(
        ("answer", "row", "score"),
        [
            ("One two three.", FEW, 1),
            ("One two three four.", FEW, 0),
            ("", FEW, 0),
            (" \n", told("punctuation:no_comma"), 0),
            ("No comma here.", told("punctuation:no_comma"), 1),
            ("A comma, here.", told("punctuation:no_comma"), 0),
            ("All lower case words here.".lower(), told("change_case:english_lowercase"), 1),
            ("Not all lower case words.", told("change_case:english_lowercase"), 0),
            ("Why? Because.", told("combination:repeat_prompt"), 1),
            ("* one\n* two", told("detectable_format:number_bullet_lists", num_bullets=2, relation=None), 1),
            ("* one", told("detectable_format:number_bullet_lists", num_bullets=2), 0),
            (
                "one, two",
                {
                    "instruction_id_list": [*FEW["instruction_id_list"], "punctuation:no_comma"],
                    "kwargs": [*FEW["kwargs"], {}],
                },
                0.5,
            ),
        ],
    )
    def test_it_is_the_share_of_instructions_followed(self, answer, row, score):
        assert scored("rule", [asked(answer, **row)]) == [score]

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            ({}, "finds no instructions beside the prompt 'Why.'.*Write: \"instruction_id_list\""),
            ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "finds no instructions"),
            ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": ["x"]}, "finds no instructions"),
            (told("punctuation:no_commas"), "does not know 'punctuation:no_commas'. Known: .*punctuation:no_comma,"),
            (told("length_constraints:number_sentences", num_sentences=2, relation="at least"), "does not know"),
            (told("length_constraints:number_words", num_words=4), 'needs relation for .*"kwargs": .*"relation"'),
            (told("length_constraints:number_words", num_words="x", relation="less than"), "failed on 1 answers"),
        ],
    )
    def test_what_it_cannot_check_is_named(self, row, says):
        with pytest.raises(ScorerError, match=says):
            scored("rule", [asked("x", **row)])


class TestCheck:
    def test_a_function_is_tried_on_every_prompt(self):
        rule = CheckedScorer.make("rule", get_registry().scorers["rule"], PairsConfig())
        rule.check([("Why?", FEW), ("How?", told("punctuation:no_comma"))])
        with pytest.raises(ScorerError, match="finds no instructions beside the prompt 'How.'"):
            rule.check([("Why?", FEW), ("How?", {})])

    def test_programs_and_models_are_not(self):
        class Dear(BatchScorer):
            def __call__(self, candidates):
                raise AssertionError("that costs something")

        CheckedScorer.make("dear", Dear, PairsConfig()).check([("Why?", {})])


class Fixed(BatchScorer):
    given = ()

    def __call__(self, candidates):
        return self.given


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((1.0,), "gave 1 scores for 2 answers"),
        ((1.0, float("nan")), "gave nan, which is no finite number, for the answer 'b' to 'Why.'"),
        ((float("inf"), 1.0), "gave inf"),
        ((1.0, None), "gave None, which is no finite number"),
        ((1.0, "2"), "gave '2', which is no finite number"),
        (None, "failed on 2 answers, of which the first is the answer 'a' to 'Why.': TypeError"),
    ],
)
def test_scores_that_are_none_are_refused_by_name(given, says):
    wrong = type("Wrong", (Fixed,), {"given": given})
    with pytest.raises(ScorerError, match=f"the scorer 'mine' {says}.*Write|write"):
        scored("mine", [asked("a"), asked("b")], wrong)


def test_a_plain_function_gets_prompt_answer_and_row_and_may_raise():
    assert scored("mine", [asked("ab", best=3)], lambda prompt, answer, row: len(prompt + answer) * row["best"]) == [18]
    with pytest.raises(ScorerError, match="the scorer 'mine' failed on 1 answers.*KeyError: 'best'"):
        scored("mine", [asked("ab")], lambda prompt, answer, row: row["best"])
    assert scored("mine", [], lambda *_: 1 / 0) == []
    assert scored("length", [asked("four")]) == [4]


COUNT = """
import json, sys
print("to stderr", file=sys.stderr)
for line in sys.stdin:
    row = json.loads(line)
    print(len(row["answer"]) * row["factor"] + len(row["prompt"]))
"""


class TestCommand:
    def command(self, tmp_path, program):
        (tmp_path / "score me.py").write_text(program)
        return f"{sys.executable} '{tmp_path / 'score me.py'}'"

    def test_it_reads_rows_and_prints_numbers(self, tmp_path):
        command = self.command(tmp_path, COUNT)
        candidates = [asked("aé\n\u2028", factor=2), asked("", factor=3)]
        assert scored("command", candidates, command=command) == [12, 4]

    @pytest.mark.parametrize(
        ("program", "says"),
        [
            ("import sys; sys.exit(3)", "ended with 3.*write: command:"),
            ("print('fine')", "printed 'fine', which is no number"),
            ("print(1)", "gave 1 scores for 2 answers"),
            ("print('nan\\n1')", "gave nan"),
            ("import sys; sys.stdout.buffer.write(bytes([255, 10]))", "something else than UTF-8"),
        ],
    )
    def test_a_program_that_fails_is_named(self, tmp_path, program, says):
        with pytest.raises(ScorerError, match=says):
            scored("command", [asked("a"), asked("b")], command=self.command(tmp_path, program))

    def test_one_that_hangs_is_ended_with_what_it_has_started(self, tmp_path):
        mark = tmp_path / "mark"
        child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
        program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
        with pytest.raises(ScorerError, match="took longer than 0.5 s for a batch. Write: timeout: 1$"):
            scored("command", [asked("a")], command=self.command(tmp_path, program), timeout=0.5)
        assert not mark.exists()

    @pytest.mark.parametrize(
        ("command", "says"),
        [
            (None, "needs a program. Write: command: python"),
            ("no-such-program x", "names no program"),
            ("python 'x", "cannot be split"),
        ],
    )
    def test_what_is_no_program_is_refused_at_once(self, command, says):
        with pytest.raises(ConfigError, match=says):
            CheckedScorer.make("command", get_registry().scorers["command"], PairsConfig(command=command))


class TestRewardModel:
    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory):
        found = {}
        for outputs in (1, 2):
            folder = tmp_path_factory.mktemp("reward")
            torch.manual_seed(0)
            shape = LlamaConfig(
                vocab_size=len(tiny.tokenizer()), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, num_labels=outputs, pad_token_id=tiny.tokenizer().pad_token_id,
            )  # fmt: skip
            LlamaForSequenceClassification(shape).save_pretrained(folder)
            tiny.tokenizer().save_pretrained(folder)
            found[outputs] = folder
        return found

    def test_it_gives_the_models_own_output(self, folders):
        model = LlamaForSequenceClassification.from_pretrained(folders[1]).eval()
        chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
        ids = tiny.tokenizer().apply_chat_template(chat, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            expected = float(model(**ids).logits[0, 0])
        candidates = [asked("Because."), asked("A longer answer than that."), asked("Because.", messages=chat[:1])]
        found = scored("reward_model", candidates, reward_model=str(folders[1]))
        assert found[0] == pytest.approx(expected, abs=1e-6)
        assert found[2] == found[0] != found[1]

    def test_what_is_no_reward_model_is_refused_before_weights_are_read(self, folders, tmp_path):
        for model, says in (
            (None, "needs a model"),
            (str(folders[2]), "has 2 outputs"),
            (str(tmp_path), "cannot be read"),
        ):
            with pytest.raises(DPOPluginError, match=says):
                CheckedScorer.make(
                    "reward_model", get_registry().scorers["reward_model"], PairsConfig(reward_model=model)
                )
