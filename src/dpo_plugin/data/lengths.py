"""Pairs that are longer than the model is to see: dropped, refused, or cut without losing their end of turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo_plugin.data.render import PairIds


@dataclass(frozen=True)
class LengthLimit:
    """What to do with pairs that are too long.

    Attributes:
        tokens: Longest prompt + completion in tokens, special tokens counted.
        strategy: drop the pair, truncate it, or raise.
        side: Where truncation begins: ``right`` cuts completions, ``left`` the beginning of the prompt.
    """

    tokens: int
    strategy: Literal["drop", "truncate", "raise"] = "drop"
    side: Literal["left", "right"] = "right"


def fit(ids: PairIds, limit: LengthLimit, end_tokens: int, bos: int | None = None) -> tuple[PairIds, list[int]] | None:
    """Cut a pair to a length, keeping each completion's end-of-turn tokens.

    Args:
        ids: The pair.
        limit: The limit; its strategy is not looked at.
        end_tokens: How many tokens end a turn.
        bos: Id that stays in front when the prompt is cut from the left.

    Returns:
        The pair and the tokens cut from prompt, chosen and rejected; None if no completion token would be left.
    """
    prompt = ids.prompt
    if limit.side == "left":
        keep = max(limit.tokens - max(len(ids.chosen), len(ids.rejected)), 1)
        if keep < len(prompt):
            front = prompt[:1] if prompt[0] == bos and keep > 1 else []
            prompt = front + prompt[len(prompt) - keep + len(front) :]
    room = limit.tokens - len(prompt)
    if room < end_tokens + 1:
        return None
    chosen, rejected = (_cut_answer(answer, room, end_tokens) for answer in (ids.chosen, ids.rejected))
    cut = [len(ids.prompt) - len(prompt), len(ids.chosen) - len(chosen), len(ids.rejected) - len(rejected)]
    return PairIds(prompt, chosen, rejected), cut


def _cut_answer(answer: list[int], room: int, end_tokens: int) -> list[int]:
    if len(answer) <= room:
        return answer
    return answer[: room - end_tokens] + answer[len(answer) - end_tokens :]
