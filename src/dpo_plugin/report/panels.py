"""Which charts a report has: what each draws, and the sentence that says what it should do."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_plugin.health.history import History, Series
from dpo_plugin.metrics.fields import explain
from dpo_plugin.report.charts import Chart, Line
from dpo_plugin.types import Finding

Rewards = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Prefix of fields → ``start`` and ``end`` → ``step``, ``chosen`` and ``rejected``, rewards of single pairs."""

MOST_LINES = 6
"""Curves in a chart; there are as many colours."""

FIRST = ("loss", "accuracy", "margin", "rewards")
"""Panels that are open; the others are folded."""

OTHER_CHARTS = 12
"""Most charts of fields that no sentence explains."""


@dataclass(frozen=True)
class Panel:
    """A `Chart` before a run is known.

    Attributes:
        fields: Logged field → its name in the legend; those that begin with ``eval_`` are of held-out data.
        note: What the caption says besides what the fields mean and should do.
    """

    key: str
    title: str
    fields: Mapping[str, str]
    level: tuple[float, str] | None = None
    log: bool = False
    note: str = ""

    @property
    def caption(self) -> str:
        """What the chart shows and what it should do."""
        said = [explain(name) for name in self.fields if not name.startswith("eval_")]
        return " ".join([*said, self.note]).strip()


def _splits(field: str) -> dict[str, str]:
    return {field: "training", f"eval_{field}": "held out"}


def _sides(field: str) -> dict[str, str]:
    """The field of chosen and of rejected, for training and for held-out pairs; ``field`` has {} for the side."""
    trained = {field.format(side): side for side in ("chosen", "rejected")}
    return trained | {f"eval_{name}": f"{side}, held out" for name, side in trained.items()}


PANELS = (
    Panel("loss", "Loss", _splits("loss"), note="A held-out loss that rises while the other falls is overfitting."),
    Panel("losses", "Losses one by one", {}, note="What the loss is made of, each before its weight."),
    Panel("accuracy", "Accuracy", _splits("rewards/accuracies"), (0.5, "chance")),
    Panel(
        "margin", "Margin", _splits("rewards/margins"), (0.0, ""),
        note="Shaded: from the 10th to the 90th percentile of pairs; its lower edge should rise in the end too.",
    ),
    Panel("rewards", "Rewards", _sides("rewards/{}"), (0.0, "")),
    Panel("displacement", "Log-probability against step 0", _sides("logps/{}_displacement"), (0.0, "")),
    Panel(
        "logps", "Log-probability of the answers", _sides("logps/{}"), note="It varies with the lengths of the pairs."
    ),
    Panel("logits", "Logits", _sides("logits/{}")),
    Panel(
        "sources", "Accuracy by source", {}, (0.5, "chance"),
        note="Of each source alone. All should rise; one that stays behind may have other labels, or too few pairs.",
    ),
    Panel("win_rate", "Win rate", {"samples/win_rate": "policy against reference"}, (0.5, "chance")),
    Panel("score", "Score of the answers", {"samples/score": "policy"}),
    Panel("divergence", "Divergence of the answers", {"samples/divergence": "KL per token"}),
    Panel("gradient", "Gradient norm", {"grad_norm": "gradient norm"}, log=True),
    Panel("rate", "Learning rate", {"learning_rate": "learning rate"}),
    Panel(
        "pairs", "Pairs wrong, pairs learned",
        {"rewards/negative_margins": "margin below 0", "rewards/saturated": "saturated"},
    ),
    Panel("lengths", "Answer lengths", {"lengths/chosen": "chosen", "lengths/rejected": "rejected"}),
    Panel("length_margin", "Margin and length", _splits("lengths/margin_correlation"), (0.0, "")),
    Panel(
        "length_accuracy", "Accuracy by length",
        {"lengths/accuracy_chosen_longer": "chosen longer", "lengths/accuracy_chosen_shorter": "chosen shorter"},
        (0.5, "chance"),
    ),
    Panel("per_token", "Margin per token", _splits("logratios/margin_per_token"), (0.0, "")),
    Panel("entropy", "Entropy", {"entropy/chosen": "chosen", "entropy/rejected": "rejected"}),
    Panel(
        "drift", "Adapter drift",
        {"adapter/distance": "from the reference", "adapter/update_norm": "since the line before"}, log=True,
    ),
    Panel(
        "speed", "Pairs per second", {"speed/pairs_per_second": "training"},
        note="Should hold; a lasting drop means another job on the machine, or longer data.",
    ),
)  # fmt: skip
"""In the order of the page."""

MARKED_ON = {
    "no_completion_tokens": "lengths", "pairs_mostly_cut": "lengths", "step_zero_identity": "rewards",
    "not_finite": "loss", "gradient_vanished": "gradient", "gradient_exploded": "gradient", "loss_diverged": "loss",
    "loss_at_ln2": "loss", "margin_not_rising": "margin", "accuracy_at_chance": "accuracy",
    "likelihood_displacement": "displacement", "overfitting": "loss", "length_exploitation": "length_margin",
    "saturated_pairs": "pairs", "quantised_rewards": "rewards", "learning_rate_below_precision": "rate",
    "reference_drift": "rewards",
}  # fmt: skip
"""Check → panel; other checks are marked where one of their finding's numbers is drawn, or else on the loss."""


def charts(history: History, findings: Sequence[Finding], rewards: Rewards | None = None) -> Iterator[Chart]:
    """The charts of one run, each with the findings that it shows, numbered from 1 in their order."""
    lines = {panel.key: _lines(history, panel.fields) for panel in PANELS}
    lines |= {"losses": _loss_lines(history), "sources": _source_lines(history)}
    drawn = {key: some for key, some in lines.items() if some}
    marks: dict[str, dict[int, tuple[int, int]]] = {}
    for number, finding in enumerate(findings, 1):
        marks.setdefault(_panel_of(finding, drawn), {})[number] = finding.first_step, finding.last_step
    last, first_loss = history.step, history["loss"].values[:1]
    for panel in PANELS:
        if panel.key in drawn:
            at_ln2 = panel.key == "loss" and any(abs(loss - 0.6931) < 0.01 for loss in first_loss)
            level, mark = (0.6931, "ln 2") if at_ln2 else panel.level, marks.get(panel.key)
            yield Chart(panel.key, panel.title, panel.caption, drawn[panel.key], level, panel.log, mark, last)
        if panel.key == "rewards":
            yield from reward_charts(rewards or {})
        if panel.key == "divergence":
            yield from _score_over_divergence(history)
    for name in [name for name in history.names() if not explain(name) and len(history[name]) > 1][:OTHER_CHARTS]:
        caption = "Logged by another package or trainer."
        yield Chart(f"field-{name.replace('/', '-')}", name, caption, [Line(name, history[name])], last=last)


def reward_charts(rewards: Rewards) -> Iterator[Chart]:
    """Draw the rewards of single pairs at the start and at the end, of held-out pairs where there are some."""
    prefix = next((name for name in rewards if name.startswith("eval")), "")
    course, which = rewards.get(prefix, {}), "held-out" if prefix else "training"
    values = [value for one in course.values() for side in ("chosen", "rejected") for value in one[side]]
    if not values:
        return
    span = (min(values), max(values))
    whens = ("start", "end") if course["start"]["step"] < course["end"]["step"] else ("end",)
    for when in whens:
        step, count = course[when]["step"], len(course[when]["chosen"])
        caption = (
            f"Share of {count} {which} pairs by reward, at step {step}. Chosen should come to lie to the right of "
            "rejected; where policy and reference agree all are 0."
        )
        sides = {side: course[when][side] for side in ("chosen", "rejected")}
        yield Chart(f"rewards-{when}", f"Rewards at the {when}", caption, spreads=sides, span=span)


def _score_over_divergence(history: History) -> Iterator[Chart]:
    """Draw what the answers have gained against how far the policy has gone for it (Rafailov et al. 2023, fig. 2)."""
    score, far = history["samples/score"], history["samples/divergence"]
    at = dict(zip(far.steps, far.values, strict=True))
    both = [(at[step], value) for step, value in zip(score.steps, score.values, strict=True) if step in at]
    if len(both) > 1:
        series = Series(*(array("d", column) for column in zip(*both, strict=True)))
        caption = (
            "Each dot is a sampling, in the order of the steps. Should rise to the right; where it turns down, the "
            "policy goes on moving away from the reference and its answers become worse."
        )
        line = [Line("policy", series, held_out=True)]
        yield Chart("score-divergence", "Score against divergence", caption, line, across="KL per token, nats")


def comparison(runs: Mapping[str, History]) -> Iterator[Chart]:
    """Draw the same measure of several runs, at most `MOST_LINES`, in one chart."""
    shown = dict(list(runs.items())[:MOST_LINES])
    last = max(run.step for run in shown.values())
    for panel in PANELS:
        for field in panel.fields:
            lines = [
                Line(name, ranked(run, field), field.startswith("eval_"), layer=layer)
                for layer, (name, run) in enumerate(shown.items(), 1)
                if len(ranked(run, field))
            ]
            if lines:
                title = panel.title if len(panel.fields) == 1 else f"{panel.title}: {panel.fields[field]}"
                key = f"all-{panel.key}-{field.replace('/', '-')}"
                yield Chart(key, title, explain(field), lines, panel.level, panel.log, last=last)
                if panel.key == "margin":
                    yield from _over_beta(shown, field, title, last)


def _over_beta(runs: Mapping[str, History], field: str, title: str, last: int) -> Iterator[Chart]:
    """Draw the margin over β, in nats, by which runs of different β can be compared."""
    lines = []
    for layer, (name, run) in enumerate(runs.items(), 1):
        if field in run and run.facts.beta:
            scaled = Series(run[field].steps, array("d", (v / run.facts.beta for v in run[field].values)))
            lines.append(Line(name, scaled, field.startswith("eval_"), layer=layer))
    if lines:
        caption = "The margin before β, in nats, by which runs of different β can be compared."
        key = f"all-nats-{field.replace('/', '-')}"
        yield Chart(key, title.replace("Margin", "Margin/β"), caption, lines, (0.0, ""), last=last)


def ranked(history: History, name: str) -> Series:
    """Get a series; an accuracy without the lines before the first update, where all margins are 0."""
    series = history[name]
    if "/accurac" not in name:
        return series
    before = name.partition("lengths/")[0]
    margins = history[name.replace("accuracies", "margins") if "accuracies" in name else f"{before}rewards/margins"]
    if not len(margins):
        return series
    first = next((step for step, margin in zip(margins.steps, margins.values, strict=True) if margin), history.step + 1)
    skip = bisect_left(series.steps, first)
    return Series(series.steps[skip:], series.values[skip:])


def _lines(history: History, fields: Mapping[str, str]) -> list[Line]:
    """Curves of fields; a held-out one has the colour of its training one where there are several of each."""
    lines = []
    kinds = list(dict.fromkeys(name.removeprefix("eval_") for name in fields))
    for name, label in fields.items():
        if len(series := ranked(history, name)):
            band = (history[f"{name}_p10"], history[f"{name}_p90"]) if name == "rewards/margins" else None
            colour = kinds.index(name.removeprefix("eval_")) if len(kinds) > 1 else None
            lines.append(Line(label, series, name.startswith("eval_"), band, colour))
    return lines


def _loss_lines(history: History) -> list[Line]:
    """The losses that a run adds up."""
    names = [name for name in history.names() if name.startswith("loss/")]
    return [Line(name.removeprefix("loss/"), history[name]) for name in names[:MOST_LINES]]


def _source_lines(history: History) -> list[Line]:
    """Of held-out pairs if there are several evaluations, since a log line has few pairs of each source."""
    for prefix, enough in (("eval_", 2), ("", 1)):
        group = f"{prefix}rewards/accuracies/"
        names = [name for name in history.names() if name.startswith(group) and len(ranked(history, name)) >= enough]
        if names:
            pairs = {name: sum(history[name.replace("accuracies", "count")].values) for name in names}
            kept = sorted(names, key=lambda name: -pairs[name])[:MOST_LINES]
            return [Line(name.removeprefix(group), ranked(history, name), bool(prefix)) for name in sorted(kept)]
    return []


def _panel_of(finding: Finding, drawn: Mapping[str, object]) -> str:
    named = [panel.key for panel in PANELS if any(field in finding.numbers for field in panel.fields)]
    wanted = [MARKED_ON.get(finding.check, ""), *named, "loss"]
    return next((key for key in wanted if key in drawn), "")
