"""One page about one run, or several side by side: verdict first, then curves, data, answers and settings.

The page is a single file without network access; charts are SVG, readable at 360 pixels and in dark mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_plugin.errors import DataError
from dpo_plugin.health.history import History
from dpo_plugin.report import sections
from dpo_plugin.report.page import number, page, percent
from dpo_plugin.report.panels import FIRST, charts, comparison, ranked
from dpo_plugin.report.run_folder import RunRecord


def write_report(runs: Sequence[RunRecord], path: str | Path) -> Path:
    """Write the report of one run, or of several with a comparison, to an HTML file.

    Raises:
        DataError: If there is no run.
    """
    if not runs:
        raise DataError("a report needs a run. Write: axolotl dpo report <output_dir>")
    named = _named_apart(runs)
    if len(runs) == 1:
        drawn = list(charts(runs[0].history, runs[0].findings, runs[0].rewards))
        first = [*FIRST, "rewards-start", "rewards-end"]
    else:
        drawn = list(comparison({run.name: run.history for run in named}))
        first = [chart.key for chart in drawn if chart.key.startswith(tuple(f"all-{key}-" for key in (*FIRST, "nats")))]
    text = page(
        title=f"DPO run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs",
        runs=named,
        rows=_rows(named),
        differences=_differences(named),
        charts=[chart for chart in drawn if chart.key in first],
        more=[chart for chart in drawn if chart.key not in first],
        sections=sections,
        verdict_of=verdict,
        course_of=_course,
        tiles_of=_tiles,
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return target


# ── verdict ──


def verdict(run: RunRecord) -> tuple[str, str]:
    """Judge a run: ``good``, ``warning`` or ``error``, and a sentence."""
    errors = sum(finding.severity == "error" for finding in run.findings)
    warnings = len(run.findings) - errors
    if errors:
        more = f", and {_count(warnings, 'thing')} to look at" if warnings else ""
        they_are = "they are" if errors > 1 else "it is"
        return "error", f"{_count(errors, 'fault')}: do not use this adapter before {they_are} understood{more}."
    if warnings:
        return "warning", f"No fault, but {_count(warnings, 'thing')} to look at."
    if "rewards/margins" not in run.history and "eval_rewards/margins" not in run.history:
        return "warning", "The log has no rewards, so nothing can be said about preferences."
    return "good", "Nothing was found that speaks against this run."


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


def _course(history: History) -> str:
    """Say what the run did, in a sentence or two."""
    parts = []
    loss, accuracy = history["loss"], ranked(history, "eval_rewards/accuracies")
    if len(loss):
        parts.append(f"The loss went from {number(loss.values[0])} to {number(loss.values[-1])}")
    if len(accuracy):
        count = history["eval_rewards/count"].tail(1)
        of = f" of {number(count[0][1])} held-out pairs" if count else " of the held-out pairs"
        parts.append(f"{percent(accuracy.values[-1])}{of} are ranked right")
    sentence = " and ".join(parts) + "." if parts else ""
    planned = history.facts.planned_steps
    if planned and history.step < planned:
        sentence += f" The log ends at step {number(history.step)} of {number(planned)} planned."
    return sentence


_TILES = {
    "rewards/accuracies": "accuracy, training",
    "eval_rewards/accuracies": "accuracy, held out",
    "rewards/margins": "margin, training",
    "eval_rewards/margins": "margin, held out",
    "loss": "loss, training",
    "eval_loss": "loss, held out",
    "logps/chosen_displacement": "chosen since step 0, nats/token",
}


def _tiles(history: History) -> dict[str, float]:
    values = {label: sections.last(history, name) for name, label in _TILES.items()}
    return {"steps": history.step} | {label: value for label, value in values.items() if value is not None}


# ── several runs ──


def _named_apart(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Number the runs of one name."""
    same = [sum(other.name == run.name for other in runs[:place]) for place, run in enumerate(runs)]
    return [replace(run, name=f"{run.name} ({n + 1})") if n else run for n, run in zip(same, runs, strict=True)]


def _rows(runs: Sequence[RunRecord]) -> list[tuple[str, list[Any]]]:
    """The table that compares runs: label, and a cell for each."""
    rows: list[tuple[str, list[Any]]] = [
        ("verdict", [verdict(run)[1] for run in runs]),
        ("steps", [run.history.step for run in runs]),
    ]
    for name, label in {**_TILES, **_NATS}.items():
        over = [run.history.facts.beta if name in _NATS else 1.0 for run in runs]
        values = [sections.last(run.history, name.removesuffix("/β")) for run in runs]
        rows.append((label, [v / b if v is not None and b else None for v, b in zip(values, over, strict=True)]))
    return [(label, cells) for label, cells in rows if any(cell is not None for cell in cells)]


_NATS = {"rewards/margins/β": "margin/β, training, nats", "eval_rewards/margins/β": "margin/β, held out, nats"}
"""Rows of the comparison that do not depend on β."""


def _differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs."""
    settings = [sections.settings_of(run) for run in runs]
    names = sorted({name for one in settings for name in one})
    rows = [(name, [one.get(name, "–") for one in settings]) for name in names]
    return [(name, cells) for name, cells in rows if len(set(cells)) > 1]
