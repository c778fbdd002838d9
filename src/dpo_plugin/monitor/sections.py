"""Sections of a report below its curves: fields, data, answers, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dpo_plugin.monitor.fields import explain
from dpo_plugin.monitor.history import History
from dpo_plugin.monitor.page import flat, number, table
from dpo_plugin.monitor.runs import RunRecord

SAMPLES_SHOWN = 30


def last(history: History, name: str) -> float | None:
    """The last logged value of a field."""
    tail = history[name].tail(1)
    return tail[0][1] if tail else None


def fields_section(history: History) -> str:
    """Every logged field with its last values and what it means."""
    names = sorted({name.removeprefix("eval_") for name in history.names()})
    return f'<div class="sides">{"".join(_field(history, name) for name in names)}</div>'


def _field(history: History, name: str) -> str:
    values = {"": last(history, name), "held out ": last(history, f"eval_{name}")}
    shown = ", ".join(f"{which}{number(value)}" for which, value in values.items() if value is not None)
    sentence = explain(name) or explain(f"eval_{name}")
    return f"<p><code>{escape(name)}</code> <b>{shown}</b><br><small>{escape(sentence)}</small></p>"


def data_section(audits: Sequence[Mapping[str, Any]]) -> str:
    """The data audit."""
    return "<h2>Data</h2>" + "".join(map(_data_set, audits)) if audits else ""


def _data_set(audit: Mapping[str, Any]) -> str:
    """What became of the rows of a data set, how long its pairs are, and where they come from."""
    where = f"{audit.get('where', '')} {audit.get('path', '')}".strip()
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in (audit.get("left_out") or {}).items()) or "none"
    counts = f"{number(audit.get('read'))} rows read, {number(audit.get('kept'))} pairs kept, "
    parts = [
        f"<h3>{escape(where)}</h3><p>{counts}{number(audit.get('cut'))} of them cut. Left out: {escape(left_out)}."
    ]
    lengths = audit.get("lengths") or {}
    if "chosen_minus_rejected" in lengths:
        parts.append(
            f" Chosen is longer in {lengths.get('chosen_longer', 0):.0%} of the pairs, by "
            f"{number(lengths['chosen_minus_rejected'])} tokens on average over all."
        )
    sides = [name for name in ("prompt", "chosen", "rejected") if name in lengths]
    shares = {"median": "p50", "95 %": "p95", "longest": "max"}
    rows = [(side, *(lengths[side].get(share) for share in shares.values())) for side in sides]
    tables = [table(("tokens of", *shares), rows)] if rows else []
    sources = audit.get("by_source") or {}
    if len(sources) > 1:
        kept = [(name or "(none)", found.get("kept", 0)) for name, found in sources.items()]
        tables.append(table(("source", "pairs kept"), kept))
    return f'<div class="card">{"".join(parts)}</p><div class="sides">{"".join(tables)}</div></div>'


def answers_section(samples: Sequence[Mapping[str, Any]]) -> str:
    """Answers of policy and reference to the same prompts."""
    if not samples:
        return ""
    shown = "".join(map(_sample, samples[-SAMPLES_SHOWN:]))
    more = f'<p class="quiet">The last {SAMPLES_SHOWN} of {len(samples)}.</p>' if len(samples) > SAMPLES_SHOWN else ""
    return f"<h2>Answers</h2>{shown}{more}"


def _sample(sample: Mapping[str, Any]) -> str:
    """A prompt over the answers to it, side by side where there is room."""
    prompt = f'<small>prompt</small><div class="said">{escape(_plain(sample.get("prompt")))}</div>'
    answers = "".join(
        f'<div><small>{escape(name)}</small><div class="said">{escape(_plain(value))}</div></div>'
        for name, value in sample.items()
        if name != "prompt" and value is not None
    )
    return f'<div class="card">{prompt}<div class="sides">{answers}</div></div>'


def _plain(value: Any) -> str:
    """Messages as text, one line per turn; an answer as its text and reward; numbers in four digits."""
    if isinstance(value, Mapping) and "text" in value:
        reward = value.get("reward")
        return f"{value['text']}" + (f"\n\nreward {number(reward)}" if isinstance(reward, float) else "")
    if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in value)
    return number(value) if isinstance(value, float) else str(value)


def settings_of(run: RunRecord) -> dict[str, str]:
    """The run's config, or where it was not written what else is known of its settings."""
    return flat(run.config) or flat(run.history.facts.to_dict())


def settings_section(run: RunRecord) -> str:
    """The run's settings, folded."""
    rows = "".join(f"<p><code>{escape(name)}</code> {escape(value)}</p>" for name, value in settings_of(run).items())
    return f'<details><summary>Settings</summary><div class="sides">{rows}</div></details>'
