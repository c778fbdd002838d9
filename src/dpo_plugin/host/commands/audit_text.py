"""What ``axolotl dpo audit`` has found, as JSON-ready values and for the terminal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Column, Table
from rich.text import Text

from dpo_plugin.data.suspects import (
    AuditedPair,
    Margins,
    PairChecks,
    length_gap,
    lowest,
    percentiles,
    share,
    suspects,
)
from dpo_plugin.errors import DataError
from dpo_plugin.plain_text import one_line

INSTALL = "pip install 'dpo-plugin[audit]'"

_ROWS_OF_GROUP = 10  # row numbers that are named of a prompt that repeats


def audit_result(
    audits: Sequence[Mapping[str, Any]],
    pairs: Sequence[AuditedPair],
    held_out: int,
    checks: PairChecks,
    margins: Margins | None,
    rows: int,
) -> dict[str, Any]:
    """Everything that was found, JSON-ready; lengths in tokens, margins in nats, shares in [0, 1].

    Args:
        audits: The data audit of each data set.
        pairs: The training pairs.
        held_out: How many pairs are held out.
        checks: What was found in their texts.
        margins: The reference's, if they were asked for.
        rows: How many rows of a kind to name.

    Raises:
        DataError: If there are no training pairs.
    """
    if not pairs:
        raise DataError("no training pair is left to look at. Write: a smaller val_set_size")
    left_out: Counter[str] = Counter()
    for audit in audits:
        left_out.update(audit["left_out"])
    same = sum(held.prompt == pairs[index].prompt for index, held in checks.held_out.items())
    worst = suspects(pairs, checks, margins, rows)
    return {
        "pairs": len(pairs),
        "held_out": held_out,
        "left_out": dict(left_out),
        "length_gap": length_gap(pairs),
        "same_prompt": checks.same_prompt,
        "near_prompt": None if checks.near is None else len(checks.near),
        "repeated": _groups(pairs, checks, rows),
        "duplicates": len(checks.duplicates),
        "contradictions": len(checks.contradictions),
        "both_sides": checks.both_sides,
        "same_prompt_held_out": same,
        "near_prompt_held_out": None if checks.near is None else len(checks.held_out) - same,
        "margins": None if margins is None else _margins(pairs, margins, rows),
        "suspects": [_record(pairs, index, margins) | {"reasons": reasons} for index, reasons in worst.items()],
    }


def _groups(pairs: Sequence[AuditedPair], checks: PairChecks, most: int) -> list[dict[str, Any]]:
    """The prompts that stand in most rows."""
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(checks.group):
        members[group].append(index)
    largest = sorted((group for group in members.values() if len(group) > 1), key=len, reverse=True)[:most]
    return [
        {
            "count": len(group),
            "rows": [{"where": pairs[index].where, "row": pairs[index].row} for index in group[:_ROWS_OF_GROUP]],
            "excerpt": pairs[group[0]].excerpt,
        }
        for group in largest
    ]


def _margins(pairs: Sequence[AuditedPair], margins: Margins, most: int) -> dict[str, Any]:
    per_token = np.asarray(margins.per_token)
    return {
        "nats": percentiles(margins.nats),
        "nats_per_token": percentiles(per_token),
        "prefers_rejected": share(per_token < 0),
        "lowest": [_record(pairs, index, margins) for index in lowest(per_token, most)],
        "highest": [_record(pairs, index, margins) for index in lowest(-per_token, most)],
    }


def _record(pairs: Sequence[AuditedPair], index: int, margins: Margins | None) -> dict[str, Any]:
    pair = pairs[index]
    return {
        "where": pair.where,
        "row": pair.row,
        "source": pair.source,
        "chosen_tokens": pair.chosen_tokens,
        "rejected_tokens": pair.rejected_tokens,
        "nats": None if margins is None else round(margins.nats[index], 4),
        "nats_per_token": None if margins is None else round(margins.per_token[index], 4),
        "excerpt": pair.excerpt,
    }


# ── for the terminal ──


def audit_parts(found: Mapping[str, Any]) -> list[Any]:
    """Texts and tables of what the command returns."""
    parts = [*_texts(found), *_repeated(found), *_margin_parts(found["margins"]), *_suspects(found)]
    if kept := found["kept"]:
        dropped = ", ".join(f"{rule} dropped {count}" for rule, count in kept["dropped"].items())
        parts.append(f"kept {kept['rows']} of {found['pairs']} pairs ({dropped}): {kept['out']}, type: {kept['type']}")
    return parts


def _texts(found: Mapping[str, Any]) -> list[str]:
    out = ", ".join(f"{reason} {rows}" for reason, rows in sorted(found["left_out"].items())) or "none"
    gap = found["length_gap"]
    near = found["near_prompt"]
    held = f"{found['same_prompt_held_out']} with the same, {found['near_prompt_held_out']} with nearly the same"
    if near is None:
        held = f"{found['same_prompt_held_out']} with the same"
    lines = [
        f"{found['pairs']} training pairs, {found['held_out']} held out; left out by the data audit: {one_line(out)}",
        f"chosen minus rejected, tokens: {_spread(gap)}, mean {gap['mean']:+.1f}; "
        f"chosen is longer in {gap['chosen_longer']:.0%}",
        f"pairs whose prompt an earlier one has: {found['same_prompt']} the same"
        f"{'' if near is None else f', {near} nearly the same'}",
        f"copies of an earlier pair: {found['duplicates']}",
        f"pairs that contradict others of their prompt: {found['contradictions']}; with an answer that is chosen in "
        f"one pair and rejected in another, as in a ranking: {found['both_sides']}",
        f"training pairs whose prompt is held out, too: {held if found['held_out'] else 'nothing is held out'}",
    ]
    if near is None:
        lines.append(f"prompts that are nearly the same were not looked for, which takes: {INSTALL}")
    return lines


def _spread(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:+.4g}" for name, value in numbers.items() if name.startswith("p"))


def _repeated(found: Mapping[str, Any]) -> list[Table]:
    if not found["repeated"]:
        return []
    table = Table("pairs", "rows", "prompt", title="Prompts that repeat, or nearly")
    for group in found["repeated"]:
        more = " …" if group["count"] > len(group["rows"]) else ""
        table.add_row(str(group["count"]), Text(", ".join(map(_name, group["rows"])) + more), Text(group["excerpt"]))
    return [table]


def _margin_parts(margins: Mapping[str, Any] | None) -> list[Any]:
    if margins is None:
        return ["margins of the reference: --reference computes them"]
    return [
        f"margin of the reference, nats: {_spread(margins['nats'])}",
        f"margin of the reference, nats per token: {_spread(margins['nats_per_token'])}; "
        f"it prefers rejected in {margins['prefers_rejected']:.0%}",
        _ends("Lowest margins per token: a label to doubt, or much to learn", margins["lowest"]),
        _ends("Highest margins per token: the reference prefers chosen already", margins["highest"]),
    ]


def _ends(title: str, records: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(Column("row", no_wrap=True), "source", "nats", "per token", "tokens", "prompt", title=title)
    for one in records:
        nats, mean = f"{one['nats']:+.2f}", f"{one['nats_per_token']:+.3f}"
        tokens = f"{one['chosen_tokens']} / {one['rejected_tokens']}"
        table.add_row(_name(one), Text(one["source"]), nats, mean, tokens, Text(one["excerpt"]))
    return table


def _suspects(found: Mapping[str, Any]) -> list[Any]:
    if not found["suspects"]:
        return ["no pair is suspicious"]
    table = Table(Column("row", no_wrap=True), "source", "why", "prompt", title="Most suspicious pairs")
    for one in found["suspects"]:
        table.add_row(Text(_name(one)), Text(one["source"]), Text("; ".join(one["reasons"])), Text(one["excerpt"]))
    return [table]


def _name(record: Mapping[str, Any]) -> str:
    return f"{record['where']} row {record['row']}"
