"""Pairs of scored answers, and the file in which answers are kept while they are made."""

from typing import ClassVar

import pytest

from dpo_plugin.config import PairsConfig
from dpo_plugin.data.formats import FORMATS, Columns
from dpo_plugin.errors import ConfigError
from dpo_plugin.samples.pairing import AnswersFile, ScoredAnswer, make_pairs
from dpo_plugin.samples.prompts import Prompt

CHAT = Prompt(
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}], {"source": "here", "x": 1}
)
ABOUT = {"policy": {"weights": "abc"}, "reference": {"weights": "def"}}


def answers(*scores, model="policy"):
    return [ScoredAnswer(f"answer {n}", score, model) for n, score in enumerate(scores)]


def made(given, prompt=CHAT, plain=False, **options):
    return make_pairs([prompt], [given], PairsConfig(**options), 42, ABOUT, plain)


class TestPairs:
    def test_the_best_is_paired_with_the_worst(self):
        found = made([*answers(1, 3, 0, 3), ScoredAnswer("theirs", -1, "reference")])
        (row,) = found.rows
        assert [message["content"] for message in row["chosen"]] == ["Be brief.", "Why?", "answer 1"]
        assert [message["content"] for message in row["rejected"]] == ["Be brief.", "Why?", "theirs"]
        about = {key: row[key] for key in row if key not in ("chosen", "rejected")}
        assert about == {
            "source": "here", "scorer": "rule", "seed": 42,
            "chosen_score": 3, "chosen_model": "policy", "chosen_weights": "abc",
            "rejected_score": -1, "rejected_model": "reference", "rejected_weights": "def",
        }  # fmt: skip
        assert found.counts == {"pairs": 1}
        pair = FORMATS["chat"](row, Columns())
        assert [message["content"] for message in pair.prompt] == ["Be brief.", "Why?"]

    def test_the_other_may_be_drawn_of_those_below_the_gap(self):
        prompts = [CHAT] * 60
        given = [answers(5, 4.5, 3, 1)] * 60
        rows = make_pairs(prompts, given, PairsConfig(pair="best_random", gap=1), 42, ABOUT).rows
        again = make_pairs(prompts, given, PairsConfig(pair="best_random", gap=1), 42, ABOUT).rows
        assert rows == again
        assert {row["rejected_score"] for row in rows} == {3, 1}
        assert 10 < sum(row["rejected_score"] == 3 for row in rows) < 50

    @pytest.mark.parametrize(
        ("scores", "gap", "pairs"),
        [
            ((1, 0, 1, 0, 0), 0, [("answer 0", "answer 1"), ("answer 2", "answer 3")]),
            ((3, 9, 5, 1), 0, [("answer 1", "answer 3"), ("answer 2", "answer 0")]),
            ((3, 9, 5, 1), 2, [("answer 1", "answer 3")]),
            ((2, 7), 0, [("answer 1", "answer 0")]),
            ((2, 7, 5), 0, [("answer 1", "answer 0")]),
            ((1, 1, 1, 0), 0, [("answer 0", "answer 3")]),
        ],
    )
    def test_each_answer_may_be_in_one_pair(self, scores, gap, pairs):
        found = made(answers(*scores), pair="each", gap=gap)
        assert [(row["chosen"][-1]["content"], row["rejected"][-1]["content"]) for row in found.rows] == pairs
        assert found.counts == {"pairs": len(pairs)}

    @pytest.mark.parametrize(
        ("given", "options", "counts"),
        [
            (answers(1, 1, 1), {}, {"scores too close": 1}),
            (answers(1, 2), {"gap": 1}, {"scores too close": 1}),
            (answers(1), {}, {"too few answers": 1}),
            ([], {}, {"too few answers": 1}),
            ([*answers(2), ScoredAnswer(" ", 0, "policy")], {}, {"answers empty": 1, "too few answers": 1}),
            ([*answers(2), ScoredAnswer("x", 0, "policy", False)], {}, {"answers cut": 1, "too few answers": 1}),
            ([*answers(2), *answers(0)], {}, {"answers repeated": 1, "too few answers": 1}),
        ],
    )
    def test_a_prompt_without_two_answers_that_differ_is_counted(self, given, options, counts):
        found = made(given, **options)
        assert found.rows == []
        assert found.counts == counts

    def test_prompts_that_are_read_as_they_stand_stay_texts(self):
        (row,) = made(answers(1, 0), Prompt("Once"), plain=True).rows
        assert (row["prompt"], row["chosen"], row["rejected"]) == ("Once", "answer 0", "answer 1")
        (row,) = made(answers(1, 0), Prompt("Once")).rows
        assert row["chosen"][0] == {"role": "user", "content": "Once"}


class TestFile:
    MADE_OF: ClassVar = {"seed": 1, "models": ("policy",)}

    def open(self, tmp_path, **changes):
        return AnswersFile(tmp_path / "deep" / "out.jsonl", {**self.MADE_OF, **changes}, 2, 5)

    def test_what_is_written_is_read_back(self, tmp_path):
        file = self.open(tmp_path)
        file.append([answers(1, 2), answers(3)])
        file.append([answers(4, 5), []])
        file.append([[ScoredAnswer("é\u2028\n", 1.5, "base", False)]])
        assert self.open(tmp_path).answers == file.answers
        assert len(file.answers) == 5

    def test_every_cut_goes_on_with_whole_batches(self, tmp_path):
        file = self.open(tmp_path)
        batches = [[answers(1, 2), answers(3)], [answers(4, 5), []], [answers(6)]]
        for batch in batches:
            file.append(batch)
        whole = file.path.read_bytes()
        for cut in range(len(whole)):
            file.path.write_bytes(whole[:cut])
            again = self.open(tmp_path)
            assert len(again.answers) in (0, 2, 4)
            for batch in batches[len(again.answers) // 2 :]:
                again.append(batch)
            assert file.path.read_bytes() == whole

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ('{"seed": 2, "models": ["policy"]}\n', "made otherwise: seed differs. Remove it, or write: --out <"),
            ("[]\n", "made otherwise: seed, models differs"),
            ("a row of mine\n", "is not a file of answers"),
            ('{"seed": 1, "models": ["policy"]}\n[{"x": 1}]\n[]\n', "is not a file of answers"),
            ('{"seed": 1, "models": ["policy"]}\n3\n[]\n', "is not a file of answers"),
        ],
    )
    def test_another_file_is_refused_and_left_as_it_is(self, tmp_path, text, says):
        path = tmp_path / "deep" / "out.jsonl"
        path.parent.mkdir()
        path.write_text(text)
        with pytest.raises(ConfigError, match=says):
            self.open(tmp_path)
        assert path.read_text() == text
