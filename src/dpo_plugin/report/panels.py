"""Which charts a report has: what each draws, and the sentence that says what it should do."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dpo_plugin.health.history import History, Series
from dpo_plugin.metrics.fields import explain
from dpo_plugin.report.charts import Chart, Line
from dpo_plugin.report.spreads import Rewards, reward_charts
from dpo_plugin.types import Finding

MOST_LINES = 6
"""Curves in a chart; there are as many colours."""

FIRST = ("loss", "accuracy", "margin", "rewards")
"""Panels that are open; the others are folded."""

OTHER_CHARTS = 12
"""Most charts of fields that no panel knows."""


@dataclass(frozen=True)
class Panel:
    """A chart before a run is known.

    Attributes:
        key: Its anchor in the page.
        title: A few words.
        caption: What it shows and what it should do.
        fields: Logged field → its name in the legend; those that begin with ``eval_`` are of held-out data.
        level: A horizontal line with its name.
        log: Whether the vertical axis is logarithmic.
    """

    key: str
    title: str
    caption: str
    fields: Mapping[str, str]
    level: tuple[float, str] | None = None
    log: bool = False


PANELS = (
    Panel(
        "loss", "Loss", "Starts at ln 2 with the default loss, where policy and reference agree, and should fall; the "
        "held-out loss with it. A held-out loss that rises while the other falls is overfitting.",
        {"loss": "training", "eval_loss": "held out"},
    ),
    Panel(
        "accuracy", "Accuracy", "Share of pairs whose preferred answer has the higher reward. Should rise well above "
        "one half, also on held-out pairs. At step 0 nothing is ranked, both rewards being 0.",
        {"rewards/accuracies": "training", "eval_rewards/accuracies": "held out"}, (0.5, "chance"),
    ),
    Panel(
        "margin", "Margin", "Reward of chosen minus reward of rejected, with the range from the 10th to the 90th "
        "percentile of pairs. Should rise from 0, and its lower edge in the end too.",
        {"rewards/margins": "training", "eval_rewards/margins": "held out"}, (0.0, ""),
    ),
    Panel(
        "rewards", "Rewards", "β times the log-ratio of policy and reference. Chosen should end above rejected, best "
        "without falling below 0.",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "eval_rewards/chosen": "chosen, held out",
         "eval_rewards/rejected": "rejected, held out"}, (0.0, ""),
    ),
    Panel(
        "displacement", "Log-probability against step 0", "Change in nats per token. Rejected should fall, chosen stay "
        "near 0; at −0.7 every token of chosen is half as likely as it was.",
        {"logps/chosen_displacement": "chosen", "logps/rejected_displacement": "rejected",
         "eval_logps/chosen_displacement": "chosen, held out",
         "eval_logps/rejected_displacement": "rejected, held out"}, (0.0, ""),
    ),
    Panel(
        "logps", "Log-probability of the answers", "Of the whole answer in nats; it varies with the lengths of the "
        "pairs. Chosen should not keep falling.",
        {"logps/chosen": "chosen", "logps/rejected": "rejected", "eval_logps/chosen": "chosen, held out",
         "eval_logps/rejected": "rejected, held out"},
    ),
    Panel(
        "logits", "Logits", "Mean logit over vocabulary and the tokens of the answer. Should drift slowly, and "
        "the same way on both sides.",
        {"logits/chosen": "chosen", "logits/rejected": "rejected", "eval_logits/chosen": "chosen, held out",
         "eval_logits/rejected": "rejected, held out"},
    ),
    Panel(
        "sources", "Accuracy by source", "The accuracy of each source alone. All should rise; one that stays behind "
        "may have other labels, or too few pairs.", {}, (0.5, "chance"),
    ),
    Panel(
        "gradient", "Gradient norm", "Before clipping. Should stay within a few times its first values; 0 means that "
        "nothing is learned.", {"grad_norm": "gradient norm"}, log=True,
    ),
    Panel(
        "rate", "Learning rate", "Rises in the warm-up, then follows the schedule.", {"learning_rate": "learning rate"},
    ),
    Panel(
        "pairs", "Pairs wrong, pairs learned", "Share of pairs with a margin below 0, which should fall, and of pairs "
        "with σ(margin) > 0.99, which teach nothing more and should come late.",
        {"rewards/negative_margins": "margin below 0", "rewards/saturated": "saturated"},
    ),
    Panel(
        "lengths", "Answer lengths", "Mean tokens per answer. A property of the data: should hold.",
        {"lengths/chosen": "chosen", "lengths/rejected": "rejected"},
    ),
    Panel(
        "length_margin", "Margin and length", "Correlation of the margin with the difference in length. Should stay "
        "well below 0.5; above it, length may be what is learned.",
        {"lengths/margin_correlation": "training", "eval_lengths/margin_correlation": "held out"}, (0.0, ""),
    ),
    Panel(
        "length_accuracy", "Accuracy by length", "Where chosen is the longer and where it is the shorter answer. Both "
        "should rise.",
        {"lengths/accuracy_chosen_longer": "chosen longer", "lengths/accuracy_chosen_shorter": "chosen shorter"},
        (0.5, "chance"),
    ),
    Panel(
        "per_token", "Margin per token", "In nats, before β. Should rise; if only the margin above rises, length is "
        "being learned.",
        {"logratios/margin_per_token": "training", "eval_logratios/margin_per_token": "held out"}, (0.0, ""),
    ),
    Panel(
        "entropy", "Entropy", "How undecided the policy is, in nats per token. Should fall slowly, not to 0.",
        {"entropy/chosen": "chosen", "entropy/rejected": "rejected"},
    ),
    Panel(
        "drift", "Adapter drift", "Length of the difference between policy and reference adapter, which grows ever "
        "more slowly, and of the update since the line before, which follows the learning rate.",
        {"adapter/distance": "from the reference", "adapter/update_norm": "since the line before"}, log=True,
    ),
    Panel(
        "speed", "Pairs per second", "Over all ranks, evaluation and saving included. Should hold; a lasting drop "
        "means another job on the machine, or longer data.", {"speed/pairs_per_second": "training"},
    ),
)  # fmt: skip

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
    drawn: dict[str, list[Line]] = {}
    for panel in PANELS:
        lines = _source_lines(history) if panel.key == "sources" else _lines(history, panel.fields)
        if lines:
            drawn[panel.key] = lines
    others = list(_other_fields(history))
    marks: dict[str, dict[int, tuple[int, int]]] = {}
    for number, finding in enumerate(findings, 1):
        marks.setdefault(_panel_of(finding, drawn), {})[number] = finding.first_step, finding.last_step
    last = history.step
    for panel in PANELS:
        if panel.key in drawn:
            level = (0.6931, "ln 2") if panel.key == "loss" and _starts_at_ln2(history) else panel.level
            yield Chart(
                panel.key, panel.title, panel.caption, drawn[panel.key], level, panel.log, marks.get(panel.key), last
            )
        if panel.key == "rewards":
            yield from reward_charts(rewards or {})
    for name in others[:OTHER_CHARTS]:
        caption = explain(name) or "Logged by another package or trainer."
        yield Chart(f"field-{name.replace('/', '-')}", name, caption, [Line(name, history[name])], last=last)


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
            scaled = Series()
            scaled.steps, scaled.values = run[field].steps, array("d", (v / run.facts.beta for v in run[field].values))
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
    left = Series()
    left.steps, left.values = series.steps[skip:], series.values[skip:]
    return left


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


def _source_lines(history: History) -> list[Line]:
    """Of held-out pairs if there are several evaluations, since a log line has few pairs of each source."""
    for prefix, enough in (("eval_", 2), ("", 1)):
        group = f"{prefix}rewards/accuracies/"
        names = [name for name in history.names() if name.startswith(group) and len(ranked(history, name)) >= enough]
        if names:
            kept = sorted(names, key=lambda name: -_pairs(history[name.replace("accuracies", "count")]))[:MOST_LINES]
            return [Line(name.removeprefix(group), ranked(history, name), bool(prefix)) for name in sorted(kept)]
    return []


def _pairs(counts: Series) -> float:
    return sum(counts.values)


def _other_fields(history: History) -> Iterator[str]:
    """Fields that no panel draws and no sentence explains."""
    known = {name for panel in PANELS for name in panel.fields}
    for name in history.names():
        bare = name.removeprefix("eval_")
        if name not in known and bare not in known and not explain(name) and len(history[name]) > 1:
            yield name


def _panel_of(finding: Finding, drawn: Mapping[str, object]) -> str:
    named = [panel.key for panel in PANELS if any(field in finding.numbers for field in panel.fields)]
    wanted = [MARKED_ON.get(finding.check, ""), *named, "loss"]
    return next((key for key in wanted if key in drawn), "")


def _starts_at_ln2(history: History) -> bool:
    first = history["loss"].head(1)
    return bool(first) and abs(first[0][1] - 0.6931) < 0.01
