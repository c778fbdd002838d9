"""One page about one run, or several side by side: verdict first, then curves, data, answers and settings.

The page is a single file without network access; charts are SVG, readable at 360 pixels and in dark mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dpo_plugin.errors import DataError
from dpo_plugin.monitor.charts import Chart, to_png, to_svg
from dpo_plugin.monitor.history import History
from dpo_plugin.monitor.page import number, page, prose, table
from dpo_plugin.monitor.panels import charts, comparison
from dpo_plugin.monitor.runs import RunRecord
from dpo_plugin.monitor.sections import (
    answers_section,
    data_section,
    fields_section,
    last,
    settings_of,
    settings_section,
)
from dpo_plugin.types import Finding


def write_report(runs: Sequence[RunRecord], path: str | Path) -> Path:
    """Write the report of one run, or of several with a comparison.

    Args:
        runs: As `dpo_plugin.monitor.runs.read_run` gives them.
        path: The HTML file to write.

    Raises:
        DataError: If there is no run.
    """
    if not runs:
        raise DataError("a report needs a run. Write: axolotl dpo report <output_dir>")
    if len(runs) == 1:
        title, body = f"DPO run {runs[0].name}", _one(runs[0])
    else:
        title, body = f"{len(runs)} DPO runs", _several(_named_apart(runs))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(title, body), encoding="utf-8")
    return target


def write_pngs(run: RunRecord, folder: str | Path) -> list[Path]:
    """Write each chart of a run as a PNG into a folder, named after its field or subject."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in charts(run.history, run.findings):
        to_png(chart, target / f"{chart.key}.png")
        written.append(target / f"{chart.key}.png")
    return written


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
    loss, accuracy = history["loss"], history["eval_rewards/accuracies"]
    if len(loss):
        parts.append(f"The loss went from {number(loss.values[0])} to {number(loss.values[-1])}")
    if len(accuracy):
        count = history["eval_rewards/count"].tail(1)
        of = f" of {number(count[0][1])} held-out pairs" if count else " of the held-out pairs"
        parts.append(f"{accuracy.values[-1]:.0%}{of} are ranked right")
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


def _tiles(history: History) -> str:
    values = {label: last(history, name) for name, label in _TILES.items() if name in history}
    shown = {"steps": history.step, **values}
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="card"><b>{number(value)}</b><small>{label}</small></div>' for label, value in shown.items()
        )
        + "</div>"
    )


def _verdict_card(run: RunRecord) -> str:
    level, sentence = verdict(run)
    notes = "".join(f'<p class="quiet">{escape(note)}</p>' for note in run.notes)
    course = escape(_course(run.history))
    return f'<div class="card verdict {level}"><strong>{escape(sentence)}</strong><p>{course}</p>{notes}</div>'


def _findings(findings: Sequence[Finding]) -> str:
    return (
        f'<ol class="findings">{"".join(_finding(n, one) for n, one in enumerate(findings, 1))}</ol>'
        if findings
        else ""
    )


def _finding(count: int, finding: Finding) -> str:
    advice, _, write = finding.advice.rpartition("Write: ")
    steps = f"step {number(finding.since)}" + (f" to {number(finding.last)}" if finding.last > finding.since else "")
    line = f'<code class="write">{escape(write)}</code>' if write else ""
    numbers = ", ".join(f"{name} {number(value)}" for name, value in finding.numbers.items())
    what = f'<span class="number">{count}</span><b>{prose(_sentence(finding.what))}</b>'
    return (
        f'<li class="card {finding.severity}">{what} '
        f"<small>{escape(finding.check)} · {finding.severity} · {steps} · {escape(numbers)}</small>"
        f"<p>{prose(advice.strip() or finding.advice)}</p>{line}</li>"
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


# ── sections ──


def _one(run: RunRecord) -> str:
    return f"<h1>{escape(run.name)}</h1>{_verdict_card(run)}{_tiles(run.history)}{_findings(run.findings)}" + _details(
        run, _figures(charts(run.history, run.findings))
    )


def _details(run: RunRecord, drawn: str) -> str:
    parts = [
        f"<h2>Curves</h2>{drawn}" if drawn else "",
        f"<details><summary>All fields</summary>{fields_section(run.history)}</details>",
        data_section(run.history.audits),
        answers_section(run.samples),
        settings_section(run),
        f"<footer>Read from {escape(run.read)}. Thin lines are single log lines, thick ones a running mean, dots are "
        "evaluations. Numbered red lines mark findings, from the first step to the last at which they held.</footer>",
    ]
    return "".join(parts)


def _figures(drawn: Any) -> str:
    figures = "".join(_figure(chart) for chart in drawn)
    return f'<div class="charts">{figures}</div>' if figures else ""


def _figure(chart: Chart) -> str:
    head = f"<header><h3>{escape(chart.title)}</h3><button>PNG</button></header>"
    return (
        f'<figure id="{escape(chart.key, quote=True)}">{head}'
        f"{to_svg(chart)}<figcaption>{escape(chart.caption)}</figcaption></figure>"
    )


# ── several runs ──


def _named_apart(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    named: dict[str, RunRecord] = {}
    for run in runs:
        same = sum(other.name == run.name for other in named.values())
        named[f"{run.name} ({same + 1})" if same else run.name] = run
    return named


def _several(runs: Mapping[str, RunRecord]) -> str:
    rows: list[Sequence[Any]] = [
        ("verdict", *(verdict(run)[1] for run in runs.values())),
        ("steps", *(run.history.step for run in runs.values())),
    ]
    rows += [(label, *(last(run.history, name) for run in runs.values())) for name, label in _TILES.items()]
    drawn = _figures(comparison({name: run.history for name, run in runs.items()}))
    each = "".join(
        f"<details><summary>{escape(name)}</summary>{_verdict_card(run)}{_findings(run.findings)}"
        f"{_details(run, '')}</details>"
        for name, run in runs.items()
    )
    return (
        f"<h1>{len(runs)} runs</h1><div class='card'>{table(('', *runs), rows)}</div>{_differences(runs)}"
        f"<h2>Curves</h2>{drawn}<h2>Each run</h2>{each}"
    )


def _differences(runs: Mapping[str, RunRecord]) -> str:
    """The settings that are not the same in all runs."""
    settings = [settings_of(run) for run in runs.values()]
    names = sorted({name for one in settings for name in one})
    rows = [
        (name, *(one.get(name, "") for one in settings))
        for name in names
        if len({one.get(name) for one in settings}) > 1
    ]
    if not rows:
        return ""
    return f"<h2>Settings that differ</h2><div class='card'>{table(('setting', *runs), rows)}</div>"
