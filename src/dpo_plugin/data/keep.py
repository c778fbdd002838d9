"""Which pairs a user's rules keep, and the rows as they are written for another run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_plugin.data.files import Row
from dpo_plugin.data.formats import Columns, chat, rendered_text
from dpo_plugin.data.suspects import Margins, PairChecks
from dpo_plugin.errors import ConfigError, DataError, RowError
from dpo_plugin.types import PreferencePair, RenderedPair

KNOWN = "unique, consistent, new, margin:LOW..HIGH"


@dataclass(frozen=True)
class KeepRules:
    """What a row must be to be kept.

    Attributes:
        names: ``unique``, ``consistent``, ``new`` or ``margin``, as they were given.
        low: Least margin of the reference, in nats per token.
        high: Largest one.
    """

    names: Sequence[str]
    low: float = -math.inf
    high: float = math.inf

    @classmethod
    def parse(cls, text: str) -> KeepRules:
        """Read what stands after ``--keep``.

        Raises:
            ConfigError: For an unknown rule, or bounds that are no numbers or hold nothing.
        """
        names, low, high = [], -math.inf, math.inf
        for rule in text.split(","):
            name, colon, bounds = rule.strip().partition(":")
            if name not in ("unique", "consistent", "new", "margin") or bool(colon) != (name == "margin"):
                raise ConfigError(f"`--keep {text}` has the unknown rule {rule.strip()!r}. Known: {KNOWN}")
            if name == "margin":
                low, high = _bounds(bounds, text)
            names.append(name)
        return cls(tuple(dict.fromkeys(names)), low, high)

    def apply(self, checks: PairChecks, margins: Margins | None) -> tuple[list[int], dict[str, int]]:
        """Choose pairs.

        ``unique`` comes last, whatever the order given: of each prompt it keeps the first pair that the others keep.

        Returns:
            Indices of the pairs that are kept, and how many each rule dropped; a pair counts once, for the first rule.
        """
        dropped = dict.fromkeys(self.names, 0)
        kept, seen = [], set[int]()
        for index, group in enumerate(checks.group):
            fails = {
                "consistent": index in checks.contradictions,
                "new": index in checks.held_out,
                "margin": margins is not None and not self.low <= margins.per_token[index] <= self.high,
                "unique": group in seen,
            }
            rule = next((name for name in fails if name in dropped and fails[name]), None)
            if rule is None:
                seen.add(group)
                kept.append(index)
            else:
                dropped[rule] += 1
        return kept, dropped


def _bounds(text: str, given: str) -> tuple[float, float]:
    low, dots, high = text.partition("..")
    try:
        bounds = float(low or "-inf"), float(high or "inf")
    except ValueError:
        bounds = (math.nan, math.nan)
    if not dots or not (low or high) or not bounds[0] <= bounds[1]:
        raise ConfigError(
            f"`--keep {given}`: {text!r} are no bounds in nats per token. Write: margin:-1..0.5, or margin:-1.."
        )
    return bounds


def written_row(row: Row, pair: PreferencePair | RenderedPair, name: str) -> bytes:
    """A row as a line of JSON that `dpo_plugin.chat` (of rendered text, `dpo_plugin.text`) reads as this pair.

    The row itself if that is one, with all its columns; else its messages.

    Raises:
        DataError: If there is no such line.
    """
    read = rendered_text if isinstance(pair, RenderedPair) else chat
    for candidate in (row, *(_as_text(pair) if isinstance(pair, RenderedPair) else _as_messages(pair))):
        try:
            if read(candidate, Columns()) == pair:
                return json.dumps(candidate, ensure_ascii=False).encode() + b"\n"
        except (RowError, TypeError, ValueError):  # a date or bytes in a table; half a surrogate pair in another column
            continue
    raise DataError(f"{name} cannot be written as a row that reads the same. Fix the row, or leave out --keep")


def _as_text(pair: RenderedPair) -> list[Row]:
    source = {"source": pair.source} if pair.source else {}
    return [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, **source}]


def _as_messages(pair: PreferencePair) -> list[Row]:
    """A history and two answers, or two conversations, where these part at a turn of the user."""
    rest = {"source": pair.source, "tools": pair.tools, "chat_template_kwargs": dict(pair.template_kwargs)}
    more = {key: value for key, value in rest.items() if value}
    prompt, chosen, rejected = map(list, (pair.prompt, pair.chosen, pair.rejected))
    answers = {"messages": prompt, "chosen": chosen, "rejected": rejected, **more}
    return [answers, {"chosen": prompt + chosen, "rejected": prompt + rejected, **more}]
