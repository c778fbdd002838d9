"""Scorers: how good an answer is, as a number; and the two that need no model and no program."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

from dpo_plugin.config import PairsConfig
from dpo_plugin.errors import DPOPluginError, ScorerError
from dpo_plugin.plain_text import one_line


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer that is to be scored.

    Attributes:
        prompt: What was asked: the prompt's text, or the user's last message.
        answer: The answer's text.
        row: The prompt's line of the prompts file, with all its keys.
    """

    prompt: str
    answer: str
    row: Mapping[str, Any]


Scorer = Callable[[str, str, Mapping[str, Any]], float]
"""``(prompt, answer, row) -> float``; more is better."""


class BatchScorer:
    """A scorer that sees many answers at once, or has settings; a subclass defines ``__call__``.

    Args:
        options: The section ``dpo_plugin.pairs``.

    Raises:
        ConfigError: If what it needs is not there; before a model is loaded.
    """

    def __init__(self, options: PairsConfig):
        self.options = options

    def __call__(self, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Give one score per answer, in their order."""
        raise NotImplementedError


class _EachAlone(BatchScorer):
    def __init__(self, scorer: Scorer, options: PairsConfig):
        super().__init__(options)
        self.scorer = scorer

    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        return [self.scorer(one.prompt, one.answer, one.row) for one in candidates]


@dataclass(frozen=True)
class CheckedScorer:
    """A registered scorer, whose faults become errors that name it.

    Attributes:
        name: As in the YAML.
    """

    name: str
    score: BatchScorer

    @classmethod
    def make(cls, name: str, registered: Scorer | type[BatchScorer], options: PairsConfig) -> CheckedScorer:
        """Make a scorer of what is registered under a name.

        Raises:
            ConfigError: If the settings of the section ``pairs`` that it needs are not there.
        """
        batched = registered(options) if isinstance(registered, type) else _EachAlone(registered, options)
        return cls(name, batched)

    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        """Give one finite number per answer.

        Raises:
            ScorerError: If the scorer raises, or gives another number of scores, or one that is not a finite number.
        """
        if not candidates:
            return []
        try:
            scores: list[Any] = list(self.score(candidates))
        except DPOPluginError:
            raise
        except Exception as error:  # a third party's code
            which = f" of which the first is {_shown(candidates[0])}"
            raise self._error(
                f"failed on {len(candidates)} answers,{which}: {type(error).__name__}: {error}"
            ) from error
        if len(scores) != len(candidates):
            raise self._error(f"gave {len(scores)} scores for {len(candidates)} answers")
        for candidate, score in zip(candidates, scores, strict=True):
            number = isinstance(score, int | float) or hasattr(score, "__float__")
            if not number or not math.isfinite(float(score)):
                raise self._error(f"gave {score!r}, which is no finite number, for {_shown(candidate)}")
        return [float(score) for score in scores]

    def check(self, prompts: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Score a short answer to each prompt, unless that takes a program or a model; so that faults show early.

        Args:
            prompts: What is asked, and its line of the prompts file.

        Raises:
            ScorerError: If the scorer fails.
        """
        if isinstance(self.score, _EachAlone):
            self([Candidate(asked, "Yes.", row) for asked, row in prompts])

    def _error(self, what: str) -> ScorerError:
        return ScorerError(f"the scorer {self.name!r} {what}. Mend it, or write another: pairs: {{scorer: rule}}")


def _shown(candidate: Candidate) -> str:
    return f"the answer {one_line(candidate.answer, 60)!r} to {one_line(candidate.prompt, 60)!r}"


def length(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
    """Count the answer's characters."""
    return float(len(answer))


def rule(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
    """Give the share of a prompt's verifiable instructions that the answer follows, 0 to 1.

    They are named as in google/IFEval (Zhou et al. 2023, arXiv 2311.07911) and checked by its checkers, strictly:
    ``instruction_id_list: [length_constraints:number_words]`` and ``kwargs: [{relation: less than, num_words: 30}]``,
    one object per instruction.

    Raises:
        ScorerError: If the row names no instructions, an unknown one, or not all that an instruction needs.
    """
    names, arguments = row.get("instruction_id_list"), row.get("kwargs")
    lists = isinstance(names, list) and isinstance(arguments, list) and len(names) == len(arguments)
    if not lists or not names or not all(isinstance(given, Mapping) for given in arguments or []):
        raise ScorerError(
            f"the scorer 'rule' finds no instructions beside the prompt {one_line(prompt, 60)!r}. Write: "
            '"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]'
        )
    if not answer.strip():
        return 0.0
    return sum(_follows(*both, prompt, answer) for both in zip(names, arguments or [], strict=True)) / len(names)


def _follows(name: str, arguments: Mapping[str, Any], prompt: str, answer: str) -> bool:
    known = _checkers()
    if name not in known:
        raise ScorerError(f"the scorer 'rule' does not know {name!r}. Known: {', '.join(known)}. Write: one of these")
    checker = known[name](name)
    given = {key: value for key, value in arguments.items() if value is not None}
    needed = checker.get_instruction_args_keys()
    if "prompt_to_repeat" in needed:
        given.setdefault("prompt_to_repeat", prompt)
    if missing := [key for key in needed if key not in given]:  # which it would draw at random
        line = "{" + ", ".join(f'"{key}": …' for key in missing) + "}"
        raise ScorerError(f"the scorer 'rule' needs {', '.join(missing)} for {name!r}. Write: \"kwargs\": [{line}]")
    checker.build_description(**given)
    return bool(checker.check_following(answer))


@cache
def _checkers() -> dict[str, Any]:
    """IFEval's checkers by name, as lm_eval keeps them.

    Its module fetches sentence data of nltk when it is imported; what needs it (number_sentences) is left out. The
    checkers of letters' case ask langdetect, which draws at random unless seeded.
    """
    import nltk
    from langdetect import DetectorFactory

    DetectorFactory.seed = 0
    with mock.patch.object(nltk, "download"), contextlib.redirect_stdout(io.StringIO()):
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    return {name: INSTRUCTION_DICT[name] for name in sorted(INSTRUCTION_DICT) if not name.endswith("number_sentences")}
