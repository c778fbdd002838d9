"""The prompts and the SFT data of ``make demo-real``: apart from each other, and checkable."""

import json
import sys

import pytest
import yaml

from dpo_plugin.samples.scorers import rule
from tests.support.tiny import ROOT

REAL = ROOT / "examples/real"


@pytest.fixture(scope="module")
def prompts():
    sys.path.insert(0, str(REAL))
    try:
        import prompts
    finally:
        sys.path.remove(str(REAL))
    written = yaml.safe_load(prompts.WRITTEN.read_text(encoding="utf-8"))
    return {part: list(prompts.rows(written[part], written["instructions"])) for part in prompts.FILES}


@pytest.fixture(scope="module")
def questions():
    written = yaml.safe_load((REAL / "prompts.yaml").read_text(encoding="utf-8"))
    return {part: [one for asked in written[part].values() for one in asked] for part in ("training", "held_out")}


@pytest.fixture(scope="module")
def sft():
    lines = (REAL / "sft.jsonl").read_text(encoding="utf-8").splitlines()
    return [[message["content"] for message in json.loads(line)["messages"]] for line in lines]


def test_no_topic_and_no_question_is_on_both_sides(questions, sft):
    written = yaml.safe_load((REAL / "prompts.yaml").read_text(encoding="utf-8"))
    assert not {*written["training"]} & {*written["held_out"]}
    every = questions["training"] + questions["held_out"]
    assert len(every) == len(set(every)) == 36
    assert not [asked for asked, _ in sft for question in every if asked.startswith(question)]


def test_every_question_comes_with_every_instruction(prompts):
    assert {part: len(rows) for part, rows in prompts.items()} == {"training": 192, "held_out": 96}
    for rows in prompts.values():
        assert len({row["prompt"] for row in rows}) == len(rows)
        assert len({(row["source"], *row["instruction_id_list"]) for row in rows}) == 8


FOLLOWED = {
    "english_lowercase": "cook it slowly in plenty of water and stir it well.",
    "english_capital": "COOK IT SLOWLY IN PLENTY OF WATER AND STIR IT WELL.",
    "no_comma": "Cook it slowly in plenty of water and stir it well.",
    "number_words less than": "Cook it slowly.",
    "quotation": '"Cook it slowly."',
    "end_checker I hope this helps.": "Cook it slowly. I hope this helps.",
    "title": "<<Cooking>>\n\nCook it slowly.",
    "postscript P.S.": "Cook it slowly.\n\nP.S. Enjoy it.",
}
PLAIN = "Cook it slowly, for as long as you like, in a large pot with plenty of boiling water."


def test_every_instruction_can_be_followed_and_missed(prompts):
    for row in prompts["training"] + prompts["held_out"]:
        assert rule(row["prompt"], FOLLOWED[row["source"]], row) == 1
        assert rule(row["prompt"], PLAIN, row) == 0


def test_the_sft_answers_follow_the_instructions_of_their_questions(sft):
    written = yaml.safe_load((REAL / "prompts.yaml").read_text(encoding="utf-8"))
    told = {wording: one for one in written["instructions"] for wording in one["wordings"]}
    found = [
        (asked, answer, told[wording]) for asked, answer in sft for wording in told if asked.endswith(f"? {wording}")
    ]
    assert len(found) == sum(not asked.endswith("?") for asked, _ in sft) >= 30
    for asked, answer, one in found:
        row = {"instruction_id_list": [one["id"]], "kwargs": [one.get("arguments", {})]}
        assert rule(asked, answer, row) == 1, (asked, answer)


def test_the_end_counts_what_each_adapter_follows_and_says_which_promises_are_kept(
    prompts, tmp_path, monkeypatch, capsys
):
    sys.path.insert(0, str(REAL))
    import measure

    rows = prompts["held_out"]
    (tmp_path / "prompts_heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    log = {"loss": 2.0, "loss/sigmoid": 0.69315, "logps/chosen_displacement": -0.1}
    (tmp_path / "dpo/checkpoint-1").mkdir(parents=True)
    (tmp_path / "dpo/checkpoint-1/trainer_state.json").write_text(json.dumps({"log_history": [log]}), encoding="utf-8")

    monkeypatch.setattr(sys, "argv", ["measure.py", str(tmp_path), "dpo"])
    for kept, code, gain in ((3, 0, "+0.500"), (1, 1, "+0.000")):
        good = {"sft": 1, "dpo": kept}
        by_name = {
            name: [[FOLLOWED[row["source"]]] * count + [PLAIN] * (4 - count) for row in rows]
            for name, count in good.items()
        }
        monkeypatch.setattr(measure, "answers", lambda base, adapter, asked, of=by_name: of[adapter.name])
        assert measure.main() == code
        said = capsys.readouterr().out
        assert f"dpo: {gain} ± 0.000 above the SFT adapter; chosen moved by -0.100" in said
        assert ("NO " in said) == bool(code)
