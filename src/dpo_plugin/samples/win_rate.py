"""How often the policy's answer is better than the reference's, by a scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import mean
from typing import Any

from dpo_plugin.samples.records import Answer, Sample
from dpo_plugin.samples.scorers import Candidate, CheckedScorer

_Z = 1.959964  # of a normal variable's middle 95 %


@dataclass(frozen=True, slots=True)
class WinRate:
    """Prompts to which the policy's answer has the higher score, an equal one, or a lower one than the reference's."""

    wins: int
    ties: int
    losses: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> WinRate | None:
        """Count samples; None if none has two scores."""
        both = [(sample.policy.score, sample.reference.score) for sample in samples if sample.reference is not None]
        scores = [(mine, theirs) for mine, theirs in both if mine is not None and theirs is not None]
        if not scores:
            return None
        wins, losses = (sum(sign * (mine - theirs) > 0 for mine, theirs in scores) for sign in (1, -1))
        return cls(wins, len(scores) - wins - losses, losses)

    @property
    def prompts(self) -> int:
        """How many prompts."""
        return self.wins + self.ties + self.losses

    @property
    def rate(self) -> float:
        """Wins and half of the ties, of all prompts."""
        return (self.wins + self.ties / 2) / self.prompts

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Wilson (1927), in which a tie counts as half a win; wider than it need be with ties."""
        n, p, z = self.prompts, self.rate, _Z
        middle, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))

    def __str__(self) -> str:
        low, high = self.interval
        counted = f"{self.wins} won, {self.ties} tied, {self.losses} lost"
        return f"win rate {self.rate:.3f} (95 %: {low:.3f} to {high:.3f}; {counted})"


@dataclass(frozen=True, slots=True)
class Judged:
    """What a scorer says of the answers at a temperature.

    Attributes:
        win_rate: How often the policy's answer has the higher score.
        policy: Mean score of the policy's answers.
        reference: Mean score of the reference's.
        divergence: KL(π ‖ π_ref) in nats per token, where it is estimated: at temperature 1.
    """

    win_rate: WinRate
    policy: float
    reference: float
    divergence: float | None

    @classmethod
    def of(cls, samples: Sequence[Sample], temperature: float, beta: float) -> Judged | None:
        """Sum samples up; None if none has two scores."""
        win_rate = WinRate.of(samples)
        if win_rate is None:
            return None
        scores = [[answer.score or 0.0 for answer in _answers(sample)] for sample in samples]
        policy, reference = map(mean, zip(*scores, strict=True))
        return cls(win_rate, policy, reference, divergence(samples, beta) if temperature == 1 else None)


def judged_table(found: Mapping[float, Judged]) -> Any:
    """Make a rich table: temperature, win rate and its 95 % interval, counts, mean scores, KL."""
    from rich.table import Table

    columns = ("temperature", "win rate", "95 %", "won", "tied", "lost", "policy", "reference", "KL per token")
    table = Table(*columns, title="Scores")
    for temperature, judged in found.items():
        rate, (low, high) = judged.win_rate, judged.win_rate.interval
        counts = map(str, (rate.wins, rate.ties, rate.losses))
        kl = "" if judged.divergence is None else f"{judged.divergence:.3g}"
        means = (f"{judged.policy:.3g}", f"{judged.reference:.3g}", kl)
        table.add_row(f"{temperature:g}", f"{rate.rate:.3f}", f"{low:.3f} to {high:.3f}", *counts, *means)
    return table


def scored(samples: Sequence[Sample], rows: Sequence[Mapping[str, Any]], scorer: CheckedScorer) -> list[Sample]:
    """Give both answers of each sample their scores.

    Args:
        samples: Answers.
        rows: For each the line of its prompt in the prompts file; empty for a prompt of the evaluation data.
        scorer: The scorer.

    Raises:
        ScorerError: If the scorer fails.
    """
    asked = [
        Candidate(sample.question or sample.prompt, answer.text, row)
        for sample, row in zip(samples, rows, strict=True)
        for answer in _answers(sample)
    ]
    scores = iter(scorer(asked))
    found = []
    for sample in samples:
        policy, *other = (replace(answer, score=next(scores)) for answer in _answers(sample))
        found.append(replace(sample, policy=policy, reference=other[0] if other else None))
    return found


def _answers(sample: Sample) -> list[Answer]:
    return [sample.policy, *([] if sample.reference is None else [sample.reference])]


def divergence(samples: Sequence[Sample], beta: float) -> float:
    """Estimate KL(π ‖ π_ref) in nats per token from the policy's own answers: their log π − log π_ref, by their tokens.

    It is unbiased for answers that were drawn at temperature 1 and not cut.
    """
    return sum(sample.policy.reward / beta for sample in samples) / sum(sample.policy.tokens for sample in samples)
