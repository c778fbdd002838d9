"""What is odd about pairs before they are trained on: repeats, contradictions, held-out prompts, margins."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_plugin.data.near_duplicates import PromptText, nearly_same
from dpo_plugin.plain_text import one_line
from dpo_plugin.types import Message, PreferencePair, RenderedPair

_EXCERPT = 80  # characters
_PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True, slots=True)
class AuditedPair:
    """What is looked at of a pair.

    Attributes:
        where: The data set, e.g. ``datasets[0]``.
        row: Number of the row in it, from 1, as the data audit counts.
        source: Where the row says that it comes from.
        prompt: The prompt.
        chosen: Digest of the preferred answer.
        rejected: Digest of the other one.
        chosen_tokens: Completion tokens of chosen.
        rejected_tokens: Completion tokens of rejected.
        excerpt: How the last question begins, on one line.
    """

    where: str
    row: int
    source: str
    prompt: PromptText
    chosen: bytes
    rejected: bytes
    chosen_tokens: int
    rejected_tokens: int
    excerpt: str

    @classmethod
    def of(
        cls, pair: PreferencePair | RenderedPair, where: str, row: int, source: str, tokens: tuple[int, int]
    ) -> AuditedPair:
        """A pair as a format has read it; `tokens` of chosen and rejected, as they are trained on."""
        if isinstance(pair, RenderedPair):
            prompt, question = PromptText("", pair.prompt), pair.prompt
        else:
            prompt, question = _prompt_text(pair), _last_question(pair.prompt)
        chosen, rejected = _digest(pair.chosen), _digest(pair.rejected)
        return cls(where, row, source, prompt, chosen, rejected, *tokens, one_line(question, _EXCERPT))

    @property
    def name(self) -> str:
        """The row for messages."""
        return f"{self.where} row {self.row}"


def _prompt_text(pair: PreferencePair) -> PromptText:
    setting = [message for message in pair.prompt if message["role"] == "system"]
    asked = [message for message in pair.prompt if message["role"] != "system"]
    plain = len(asked) == 1 and set(asked[0]) == {"role", "content"}  # JSON would be most of a short question's text
    around = _json([setting, pair.tools, dict(pair.template_kwargs)])
    return PromptText(around, asked[0]["content"] if plain else _json(asked))


def _last_question(prompt: Sequence[Message]) -> str:
    asked = [message["content"] for message in prompt if message["role"] == "user"]
    return asked[-1] if asked else ""


def _digest(answer: str | Sequence[Message]) -> bytes:
    text = answer if isinstance(answer, str) else _json(answer)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


@dataclass(frozen=True)
class Margins:
    """How much the reference prefers chosen, a number a pair.

    Attributes:
        nats: log π_ref(chosen) − log π_ref(rejected), which mostly shows which of the two is longer.
        per_token: The same of the mean log-probabilities per completion token, in nats.
    """

    nats: Sequence[float]
    per_token: Sequence[float]

    @classmethod
    def of(cls, pairs: Sequence[AuditedPair], logps: Sequence[tuple[float, float]]) -> Margins:
        """Margins of pairs, from (chosen, rejected) log-probabilities in nats, summed over completion tokens."""
        means = [
            (chosen / pair.chosen_tokens, rejected / pair.rejected_tokens)
            for pair, (chosen, rejected) in zip(pairs, logps, strict=True)
        ]
        return cls([one - other for one, other in logps], [one - other for one, other in means])


@dataclass(frozen=True)
class PairChecks:
    """What was found in the texts of training pairs, by their index.

    Attributes:
        group: The index of the first pair with the same prompt, or nearly the same where `near` is looked for.
        same_prompt: How many pairs have the very prompt of an earlier one.
        near: Pair → the first pair whose prompt is nearly the same; None if that was not looked for.
        duplicates: Pair → the first one with the same prompt and answers.
        contradictions: Pair → one that says the opposite, or None where only several together do.
        both_sides: How many others have an answer that is on the other side in a pair of the same prompt, as a ranking
            of more than two answers gives them.
        held_out: Pair → the held-out pair with the same prompt, or nearly the same.
    """

    group: Sequence[int]
    same_prompt: int
    near: Mapping[int, int] | None
    duplicates: Mapping[int, int]
    contradictions: Mapping[int, int | None]
    both_sides: int
    held_out: Mapping[int, AuditedPair] = field(default_factory=dict)


def check_pairs(pairs: Sequence[AuditedPair], held_out: Sequence[AuditedPair], near: bool) -> PairChecks:
    """Look for what is odd in the texts of training pairs.

    Args:
        pairs: The training pairs.
        held_out: The held-out pairs.
        near: Whether to look for prompts that are nearly the same, too, which takes datasketch.
    """
    firsts: dict[PromptText, int] = {}
    whole: dict[tuple[PromptText, bytes, bytes], int] = {}
    for index, pair in enumerate(pairs):
        firsts.setdefault(pair.prompt, index)
        whole.setdefault((pair.prompt, pair.chosen, pair.rejected), index)
    held = {pair.prompt: pair for pair in reversed(held_out)}
    leader = {prompt: prompt for prompt in firsts}
    among_held = {prompt: prompt for prompt in firsts if prompt in held}
    if near:
        leader, similar = nearly_same(firsts, [*held][::-1])
        among_held = {**similar, **among_held}
    contradictions, both_sides = find_contradictions(pairs)
    group = [firsts[leader[pair.prompt]] for pair in pairs]
    copies = {index: whole[pair.prompt, pair.chosen, pair.rejected] for index, pair in enumerate(pairs)}
    return PairChecks(
        group=group,
        same_prompt=len(pairs) - len(firsts),
        near={n: group[n] for n, pair in enumerate(pairs) if leader[pair.prompt] != pair.prompt} if near else None,
        duplicates={index: first for index, first in copies.items() if first != index},
        contradictions=contradictions,
        both_sides=both_sides,
        held_out={n: held[among_held[pair.prompt]] for n, pair in enumerate(pairs) if pair.prompt in among_held},
    )


def find_contradictions(pairs: Sequence[AuditedPair]) -> tuple[dict[int, int | None], int]:
    """Find pairs of one prompt that no ranking of its answers can agree with, such as A over B and B over A.

    Returns:
        As `PairChecks.contradictions` and `PairChecks.both_sides`.
    """
    preferred: dict[PromptText, set[bytes]] = defaultdict(set)
    dispreferred: dict[PromptText, set[bytes]] = defaultdict(set)
    for pair in pairs:
        preferred[pair.prompt].add(pair.chosen)
        dispreferred[pair.prompt].add(pair.rejected)
    on_both = {prompt: answers & dispreferred[prompt] for prompt, answers in preferred.items()}
    below: dict[tuple[PromptText, bytes], list[bytes]] = defaultdict(list)
    rows: dict[tuple[PromptText, bytes, bytes], int] = {}
    candidates = []
    for index, pair in enumerate(pairs):
        rows.setdefault((pair.prompt, pair.chosen, pair.rejected), index)
        if {pair.chosen, pair.rejected} <= on_both[pair.prompt]:  # as is every pair of a circle
            candidates.append(index)
            below[pair.prompt, pair.chosen].append(pair.rejected)
    found = {
        index: rows.get((pair.prompt, pair.rejected, pair.chosen))
        for index, pair in ((index, pairs[index]) for index in candidates)
        if _leads_to(below, pair.prompt, pair.rejected, pair.chosen)
    }
    ranked = [index for index, pair in enumerate(pairs) if {pair.chosen, pair.rejected} & on_both[pair.prompt]]
    return found, len(set(ranked) - set(found))


def _leads_to(
    below: Mapping[tuple[PromptText, bytes], Sequence[bytes]], prompt: PromptText, start: bytes, goal: bytes
) -> bool:
    """Whether pairs, one after the other, put `start` above `goal`."""
    seen, ahead = {start}, [start]
    while ahead:
        for answer in below.get((prompt, ahead.pop()), ()):
            if answer == goal:
                return True
            if answer not in seen:
                seen.add(answer)
                ahead.append(answer)
    return False


# ── numbers ──


def length_gap(pairs: Sequence[AuditedPair]) -> dict[str, float]:
    """Percentiles and mean of chosen's tokens minus rejected's, and the share of pairs whose chosen is longer."""
    gaps = np.array([pair.chosen_tokens - pair.rejected_tokens for pair in pairs])
    return {**percentiles(gaps), "mean": round(float(gaps.mean()), 2), "chosen_longer": share(gaps > 0)}


def percentiles(values: Any) -> dict[str, float]:
    """Percentiles of (pairs,) numbers, in their unit."""
    found = np.percentile(np.asarray(values, dtype=float), _PERCENTILES)
    return {f"p{one}": round(float(value), 4) for one, value in zip(_PERCENTILES, found, strict=True)}


def share(of: Any) -> float:
    """Share of (pairs,) conditions that hold, in [0, 1]."""
    return round(float(np.mean(of)), 4)


def suspects(
    pairs: Sequence[AuditedPair], checks: PairChecks, margins: Margins | None, most: int
) -> dict[int, list[str]]:
    """Name the most suspicious pairs, at most so many, worst first.

    Worst is a contradiction, then a prompt of the held-out data, then a reference that prefers rejected (of the `most`
    lowest margins per token), then a copy of another pair; of two alike, the one with more reasons, then with the
    lower margin.

    Returns:
        Index of the pair → its reasons, worst first.
    """
    reasons: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for index, other in checks.contradictions.items():
        against = "other rows of its prompt, taken together" if other is None else pairs[other].name
        reasons[index].append((0, f"contradicts {against}"))
    for index, held in checks.held_out.items():
        same = "the" if held.prompt == pairs[index].prompt else "nearly the"
        reasons[index].append((1, f"{same} same prompt as held-out {held.name}"))
    per_token: Any = margins.per_token if margins else np.zeros(len(pairs))
    for index in lowest(per_token, most):
        if (margin := per_token[index]) < 0:
            reasons[index].append((2, f"the reference prefers rejected by {-margin:.2f} nats per token"))
    for index, first in checks.duplicates.items():
        reasons[index].append((3, f"the same pair as {pairs[first].name}"))

    def badness(index: int) -> tuple[float, ...]:
        return reasons[index][0][0], -len(reasons[index]), per_token[index], index

    return {index: [text for _, text in reasons[index]] for index in sorted(reasons, key=badness)[:most]}


def lowest(values: Any, most: int) -> list[int]:
    """Indices of the lowest of (pairs,) numbers, at most so many, lowest first."""
    order: list[int] = np.argsort(np.asarray(values), kind="stable")[:most].tolist()
    return order
