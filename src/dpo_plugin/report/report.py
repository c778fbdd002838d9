"""One page about one run, or several side by side: verdict first, then curves, data, answers and settings.

The page is a single file without network access; charts are SVG, readable at 360 pixels and in dark mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dpo_plugin.errors import DataError
from dpo_plugin.health.history import History
from dpo_plugin.report import sections
from dpo_plugin.report.charts import Chart, to_svg
from dpo_plugin.report.page import number, page, percent
from dpo_plugin.report.panels import FIRST, charts, comparison, ranked
from dpo_plugin.report.run_folder import RunRecord


def write_report(runs: Sequence[RunRecord], path: str | Path) -> Path:
    """Write the report of one run, or of several with a comparison.

    Args:
        runs: As `dpo_plugin.report.run_folder.read_run` gives them.
        path: The HTML file to write.

    Raises:
        DataError: If there is no run.
    """
    if not runs:
        raise DataError("a report needs a run. Write: axolotl dpo report <output_dir>")
    if len(runs) == 1:
        content = {"title": f"DPO run {runs[0].name}", "runs": [_shown(runs[0], runs[0].name)]}
        drawn = list(charts(runs[0].history, runs[0].findings, runs[0].rewards))
        first = [*FIRST, "rewards-start", "rewards-end"]
    else:
        named = _named_apart(runs)
        content = _several(named)
        drawn = list(comparison({name: run.history for name, run in named.items()}))
        first = [chart.key for chart in drawn if chart.key.startswith(tuple(f"all-{key}-" for key in (*FIRST, "nats")))]
    figures = [_figure(chart) for chart in drawn]
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    seen = [figure for figure in figures if figure["key"] in first]
    folded = [figure for figure in figures if figure["key"] not in first]
    target.write_text(page(**content, charts=seen, more=folded), encoding="utf-8")
    return target


# ── verdict ──


def verdict(run: RunRecord) -> tuple[str, str]:
    """How it went: ``good``, ``warning`` or ``error``, and a sentence."""
    errors = sum(finding.severity == "error" for finding in run.findings)
    warnings = len(run.findings) - errors
    if errors:
        more = f", and {_count(warnings, 'thing')} to look at" if warnings else ""
        return "error", f"{_count(errors, 'fault')}: do not use this adapter before {_it(errors)} understood{more}."
    if warnings:
        return "warning", f"No fault, but {_count(warnings, 'thing')} to look at."
    if "rewards/margins" not in run.history and "eval_rewards/margins" not in run.history:
        return "warning", "The log has no rewards, so nothing can be said about preferences."
    return "good", "Nothing was found that speaks against this run."


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


def _it(count: int) -> str:
    return "they are" if count > 1 else "it is"


def _course(history: History) -> str:
    """What the run did, in a sentence or two."""
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


# ── what the template shows ──


def _shown(run: RunRecord, name: str) -> dict[str, Any]:
    level, sentence = verdict(run)
    prompts = sections.prompts(run.samples)
    return {
        "name": name,
        "about": sections.about(run),
        "level": level,
        "sentence": sentence,
        "course": _course(run.history),
        "notes": run.notes,
        "tiles": [("steps", run.history.step), *_tiles(run.history).items()],
        "findings": run.findings,
        "fields": sections.fields(run.history),
        "audits": [sections.data_set(audit) for audit in run.history.audits],
        "prompts": prompts[: sections.PROMPTS_SHOWN],
        "prompts_left": len(prompts[sections.PROMPTS_SHOWN :]),
        "settings": sections.settings_of(run),
        "read": run.read,
    }


def _tiles(history: History) -> dict[str, float | None]:
    values = {label: sections.last(history, name) for name, label in _TILES.items()}
    return {label: value for label, value in values.items() if value is not None}


def _figure(chart: Chart) -> dict[str, Any]:
    svg = Markup(to_svg(chart))  # matplotlib escapes what it writes
    return {"key": chart.key, "title": chart.title, "caption": chart.caption, "svg": svg, "marked": bool(chart.marks)}


# ── several runs ──


def _named_apart(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    named: dict[str, RunRecord] = {}
    for run in runs:
        same = sum(other.name == run.name for other in named.values())
        named[f"{run.name} ({same + 1})" if same else run.name] = run
    return named


def _several(runs: Mapping[str, RunRecord]) -> dict[str, Any]:
    rows: list[tuple[str, list[Any]]] = [
        ("verdict", [verdict(run)[1] for run in runs.values()]),
        ("steps", [run.history.step for run in runs.values()]),
    ]
    for name, label in {**_TILES, **_NATS}.items():
        over = [run.history.facts.beta if name in _NATS else 1.0 for run in runs.values()]
        values = [sections.last(run.history, name.removesuffix("/β")) for run in runs.values()]
        rows.append((label, [v / b if v is not None and b else None for v, b in zip(values, over, strict=True)]))
    return {
        "title": f"{len(runs)} runs",
        "runs": [_shown(run, name) for name, run in runs.items()],
        "rows": [(label, cells) for label, cells in rows if any(cell is not None for cell in cells)],
        "differences": _differences(runs),
    }


_NATS = {"rewards/margins/β": "margin/β, training, nats", "eval_rewards/margins/β": "margin/β, held out, nats"}
"""Rows of the comparison that do not depend on β."""


def _differences(runs: Mapping[str, RunRecord]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs."""
    settings = [sections.settings_of(run) for run in runs.values()]
    names = sorted({name for one in settings for name in one})
    rows = [(name, [one.get(name, "–") for one in settings]) for name in names]
    return [(name, cells) for name, cells in rows if len(set(cells)) > 1]
