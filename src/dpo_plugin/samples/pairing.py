"""Scored answers, as they are kept in a file, and the pairs that are made of them."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_plugin.config import PairsConfig
from dpo_plugin.errors import ConfigError
from dpo_plugin.samples.prompts import Prompt


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """An answer and its score.

    Attributes:
        text: The answer, without special tokens.
        score: The scorer's number; more is better.
        model: Who gave it: ``policy``, ``reference``, ``base``, or ``file``.
        ended: Whether the model ended it before ``max_new_tokens``.
    """

    text: str
    score: float
    model: str
    ended: bool = True


@dataclass(frozen=True, slots=True)
class Paired:
    """Rows of pairs, and what became of the prompts.

    Attributes:
        rows: For a data set of the type ``dpo_plugin.chat``, or ``dpo_plugin.text`` where prompts are plain.
        counts: Prompts by what became of them; answers that were left out, by why.
    """

    rows: list[dict[str, Any]]
    counts: Counter[str] = field(default_factory=Counter)


def make_pairs(
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[ScoredAnswer]],
    options: PairsConfig,
    seed: int,
    provenance: Mapping[str, Mapping[str, Any]],
    plain: bool = False,
) -> Paired:
    """Make pairs of the answers to each prompt, whose scores are further apart than the gap.

    ``pair: best_worst`` makes one of the best and the worst answer, ``best_random`` one of the best and one drawn of
    the others, ``each`` puts every answer into one at most: the best with the worst, the next best with the next worst.
    Empty answers, those that were cut, and repeated ones are left out. Of equal scores the first answer counts.

    Args:
        prompts: The prompts.
        answers: Answers of each.
        options: ``gap``, ``pair`` and ``scorer`` of the section ``pairs``.
        seed: Seed of the draw.
        provenance: For each model what a row says of it.
        plain: Whether prompts are texts that are read as they stand.
    """
    made = Paired([])
    for number, (prompt, given) in enumerate(zip(prompts, answers, strict=True)):
        usable = _usable(given, made.counts)
        pairs = _pairs(usable, options, random.Random(f"{seed} {number}"))
        if not pairs:
            made.counts["too few answers" if len(usable) < 2 else "scores too close"] += 1
            continue
        made.counts["pairs"] += len(pairs)
        made_with = {"scorer": options.scorer, "seed": seed}
        made.rows.extend(_row(prompt, *pair, made_with, provenance, plain) for pair in pairs)
    return made


def _usable(answers: Sequence[ScoredAnswer], counts: Counter[str]) -> list[ScoredAnswer]:
    found: dict[str, ScoredAnswer] = {}
    for answer in answers:
        why = "empty" if not answer.text.strip() else "cut" if not answer.ended else "repeated"
        if why != "repeated" or answer.text in found:
            counts[f"answers {why}"] += 1
        else:
            found[answer.text] = answer
    return list(found.values())


def _pairs(
    answers: Sequence[ScoredAnswer], options: PairsConfig, draw: random.Random
) -> list[tuple[ScoredAnswer, ScoredAnswer]]:
    best_first = sorted(answers, key=lambda answer: -answer.score)  # of equal scores the first answer comes first
    below = [answer for answer in answers if best_first[0].score - answer.score > options.gap]
    if not below:
        return []
    if options.pair == "best_random":
        return [(best_first[0], draw.choice(below))]
    worst_first = sorted(answers, key=lambda answer: answer.score)
    count = len(answers) // 2 if options.pair == "each" else 1
    ends = zip(best_first[:count], worst_first[:count], strict=True)
    return [(one, other) for one, other in ends if one.score - other.score > options.gap]


def _row(
    prompt: Prompt,
    chosen: ScoredAnswer,
    rejected: ScoredAnswer,
    made_with: Mapping[str, Any],
    provenance: Mapping[str, Mapping[str, Any]],
    plain: bool,
) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": prompt.content} if plain and isinstance(prompt.content, str) else {}
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        answered = [*prompt.messages, {"role": "assistant", "content": answer.text}]
        row[side] = answer.text if row.get("prompt") else answered
    if isinstance(prompt.row.get("source"), str):
        row["source"] = prompt.row["source"]
    row |= made_with
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        about = {"model": answer.model, **provenance[answer.model]}
        row |= {f"{side}_score": answer.score, **{f"{side}_{key}": value for key, value in about.items()}}
    return row


class AnswersFile:
    """Scored answers in a file of JSON lines that grows while they are made, so that a run that was killed goes on.

    The first line says what they were made of; each of the others has the answers to one prompt, in the prompts' order.

    Args:
        path: The file.
        made_of: What decides the answers and scores.
        at_a_time: Prompts whose answers are made together, and are kept together or not at all: what is drawn depends
            on what it is drawn with.
        total: How many prompts there are.

    Raises:
        ConfigError: If the file has other answers.
    """

    def __init__(self, path: Path, made_of: Mapping[str, Any], at_a_time: int, total: int):
        self.path = path
        self.made_of = json.loads(json.dumps(made_of))  # as it is read back
        self.at_a_time = at_a_time
        self._kept = 0  # bytes
        self.answers = self._read(total) if path.exists() else []

    def _read(self, total: int) -> list[list[ScoredAnswer]]:
        lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # the run was killed while it wrote this one
        done = len(lines) - 1
        if done < total:
            del lines[1 + done - done % self.at_a_time :]
        if not lines:
            return []
        try:
            theirs = json.loads(lines[0])
            answers = [[ScoredAnswer(**one) for one in json.loads(line)] for line in lines[1:]]
        except (ValueError, TypeError, RecursionError) as error:
            raise self._refusal(f"is not a file of answers ({error})") from error
        if theirs != self.made_of:
            differs = [
                key for key in self.made_of if not isinstance(theirs, dict) or theirs.get(key) != self.made_of[key]
            ]
            raise self._refusal(f"has answers that were made otherwise: {', '.join(differs)} differs")
        self._kept = sum(map(len, lines))
        return answers

    def _refusal(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path} {what}. Remove it, or write: --out <another file>")

    def append(self, answers: Sequence[Sequence[ScoredAnswer]]) -> None:
        """Add the answers to the next prompts."""
        lines = [json.dumps([asdict(one) for one in some], ensure_ascii=False) for some in answers]
        if not self._kept:
            lines.insert(0, json.dumps(self.made_of, ensure_ascii=False))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as handle:
            handle.truncate(self._kept)
            self._kept += handle.write("".join(f"{line}\n" for line in lines).encode())
        self.answers += [list(some) for some in answers]
