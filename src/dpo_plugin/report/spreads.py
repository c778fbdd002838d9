"""Histograms of the rewards of single pairs at the start of a run and at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_plugin.report.charts import Chart, Spread

Rewards = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Prefix of fields → ``start`` and ``end`` → ``step``, ``chosen`` and ``rejected``, rewards of single pairs."""


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
        sides = [Spread(side, course[when][side]) for side in ("chosen", "rejected")]
        yield Chart(f"rewards-{when}", f"Rewards at the {when}", caption, spreads=sides, span=span)
