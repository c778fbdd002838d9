"""What became of every row: read, kept, cut, left out and why, by source; and how long the kept ones are."""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_plugin.errors import DataError
from dpo_plugin.plain_text import one_line

EMPTY = "empty completion"
IDENTICAL = "identical pair"
SPECIAL = "special token in text"
NOT_TEXT = "images, video or sound"
LOST = "text left out by the template"
UNKNOWN = "unknown token"
EQUAL_IDS = "identical as tokens"
TOO_LONG = "too long"
EQUAL_AFTER_CUT = "identical after the cut"
DUPLICATE = "duplicate"

_EXAMPLES = 5
_LONGEST_MESSAGE = 200  # characters of an example; messages may quote the row
_PERCENTILES = (50, 90, 95, 99, 100)


@dataclass
class Audit:
    """Counts of one data set, collected while it is prepared.

    Attributes:
        read: Rows read.
        left_out: Reason → source → rows.
        cut: Source → rows of which something was cut.
        shapes: Recognised format → rows.
        kept: Source → rows kept.
        examples: The first rows left out, with number, reason and message.
        lengths: Prompt, chosen, rejected lengths in tokens of each kept pair, one after the other.
        full_lengths: Prompt + longer completion in tokens of each pair before any was cut or left out for length.
    """

    read: int = 0
    left_out: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    cut: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    full_lengths: array[int] = field(default_factory=lambda: array("q"))

    def leave_out(self, row: int, source: str, reason: str, message: str) -> None:
        """Count a row that is not used."""
        self.left_out[reason][source] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append({"row": row, "reason": reason, "message": one_line(message, _LONGEST_MESSAGE)})

    def length_that_keeps(self, share: float) -> int:
        """The sequence length in tokens at which this share of the pairs fits uncut."""
        return int(np.quantile(self.full_lengths, share, method="higher")) if self.full_lengths else 0

    def to_dict(self) -> dict[str, Any]:
        """The audit as JSON-ready values; lengths in tokens, shares in [0, 1]."""
        return {
            "read": self.read,
            "kept": sum(self.kept.values()),
            "cut": sum(self.cut.values()),
            "left_out": {reason: sum(counts.values()) for reason, counts in self.left_out.items()},
            "formats": dict(self.shapes),
            "by_source": self._by_source(),
            "examples": self.examples,
            "lengths": length_summary(np.asarray(self.lengths).reshape(-1, 3)),
            "sequence_len_for_95_percent": self.length_that_keeps(0.95),
        }

    def _by_source(self) -> dict[str, dict[str, int]]:
        table: dict[str, dict[str, int]] = defaultdict(dict)
        for name, counts in (("kept", self.kept), ("cut", self.cut), *self.left_out.items()):
            for source, rows in counts.items():
                table[source][name] = rows
        return dict(sorted(table.items()))


def length_summary(lengths: Any) -> dict[str, Any]:
    """Percentiles and biases of pair lengths.

    Args:
        lengths: (pairs, 3) prompt, chosen, rejected in tokens.

    Returns:
        Percentiles in tokens; ``chosen_minus_rejected`` (mean tokens) and ``chosen_longer`` (share of pairs), which
        show length bias; ``prompt_share`` of the tokens of two whole texts.
    """
    if not len(lengths):
        return {}
    prompt, chosen, rejected = np.asarray(lengths).T
    columns = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "pair": prompt + np.maximum(chosen, rejected)}
    return {
        **{name: _percentiles(values) for name, values in columns.items()},
        "chosen_minus_rejected": round(float((chosen - rejected).mean()), 2),
        "chosen_longer": round(float((chosen > rejected).mean()), 4),
        "prompt_share": round(float(2 * prompt.sum() / (2 * prompt + chosen + rejected).sum()), 4),
    }


def _percentiles(values: Any) -> dict[str, int]:
    found = np.percentile(values, _PERCENTILES, method="higher")
    return {f"p{share}" if share < 100 else "max": int(value) for share, value in zip(_PERCENTILES, found, strict=True)}


def check_usable(audit: Mapping[str, Any], sequence_len: int, max_bad_rows: float) -> None:
    """Stop the run if nothing, or too little, of a data set is usable.

    Args:
        audit: What `Preparation.load_or_run` gives.
        sequence_len: Longest prompt + completion in tokens.
        max_bad_rows: Share of unusable rows, in [0, 1], above which to stop.

    Raises:
        DataError: Saying what to change.
    """
    out: Mapping[str, int] = audit["left_out"]
    too_long = out.get(TOO_LONG, 0) + out.get(EQUAL_AFTER_CUT, 0)  # the config's doing
    bad = sum(out.values()) - too_long - out.get(DUPLICATE, 0)  # the data's
    named = f"`{audit['where']}` ({audit['path']})"
    first = one_line("; ".join(f"row {row['row']}: {row['message']}" for row in audit["examples"][:3]), 200)
    if not audit["read"]:
        raise DataError(f"{named} is empty. Write: path: <a file with rows>")
    if not audit["kept"] and too_long > bad:
        fits = audit["sequence_len_for_95_percent"]
        raise DataError(
            f"{named}: with `sequence_len: {sequence_len}` no completion token survives in any of {too_long} pairs. "
            f"95 % of the pairs fit in {fits} tokens. Write: sequence_len: {fits}"
        )
    if out.get(NOT_TEXT, 0) > max_bad_rows * audit["read"]:
        kept = f", or max_bad_rows: 1.0 to train on the {audit['kept']} rows of text" if audit["kept"] else ""
        raise DataError(
            f"{named}: {out[NOT_TEXT]} of {audit['read']} rows come with {NOT_TEXT}, and dpo_plugin trains on text "
            f"alone. {first}. Write: path: <a preference set of text>{kept}"
        )
    if not audit["kept"]:
        raise DataError(f"{named} has no usable row out of {audit['read']}. {first}")
    share = bad / audit["read"]
    if share > max_bad_rows:
        raise DataError(
            f"{named}: {bad} of {audit['read']} rows ({share:.0%}) cannot be used, more than "
            f"`dpo_plugin.data.max_bad_rows: {max_bad_rows}` allows. {first}. "
            f"Fix the data, or write: max_bad_rows: {math.ceil(100 * share) / 100}"
        )


def audit_lines(audits: Iterable[Mapping[str, Any]]) -> list[str]:
    """An audit in a few lines of plain text, for the log, the terminal and the model card.

    Args:
        audits: What `Preparation.load_or_run` gives.
    """
    lines = []
    for audit in audits:
        out = ", ".join(f"{reason} {rows}" for reason, rows in sorted(audit["left_out"].items())) or "none"
        formats = ", ".join(f"{name} {rows}" for name, rows in audit["formats"].items())
        lines.append(f"{audit['where']} {audit['path']}: {audit['read']} rows read as {formats or 'nothing'}")
        lines.append(f"  kept {audit['kept']} of {audit['read']} rows, of them cut {audit['cut']}; left out: {out}")
        lines += [f"  row {row['row']}: {row['reason']}: {row['message']}" for row in audit["examples"]]
        sources = audit["by_source"]
        if len(sources) > 1:
            kept = ", ".join(f"{name or '(none)'} {n.get('kept', 0)}" for name, n in sources.items())
            lines.append(f"  kept by source: {kept}")
        if lengths := audit["lengths"]:
            for name in ("prompt", "chosen", "rejected"):
                numbers = ", ".join(f"{share} {value}" for share, value in lengths[name].items())
                lines.append(f"  {name} tokens: {numbers}")
            bias, longer = lengths["chosen_minus_rejected"], lengths["chosen_longer"]
            lines.append(f"  chosen minus rejected: {bias:+.1f} tokens on average, above 0 in {longer:.0%} of pairs")
            lines.append(f"  prompts are {lengths['prompt_share']:.0%} of all tokens")
    return [one_line(line) for line in lines]
