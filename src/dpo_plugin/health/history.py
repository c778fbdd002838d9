"""What a run has logged so far, as one series per field, for health checks and the report."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from dpo_plugin.types import RunFacts

RATE = "learning_rate"

Points = Sequence[tuple[int, float]]
"""(step, value) pairs of a series."""


@dataclass(slots=True, eq=False)
class Series:
    """Finite values of one logged field by step, 16 bytes each, so that a hundred thousand lines fit."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        return len(self.values)

    def head(self, count: int) -> list[tuple[int, float]]:
        """The first (step, value) pairs, at most ``count``."""
        return list(zip(self.steps[:count], self.values[:count], strict=True))

    def tail(self, count: int) -> list[tuple[int, float]]:
        """The last (step, value) pairs, at most ``count``."""
        return list(zip(self.steps[-count:], self.values[-count:], strict=True))

    def full_tail(self, count: int) -> list[tuple[int, float]] | None:
        """The last ``count`` (step, value) pairs, or None if there are not that many yet."""
        return self.tail(count) if len(self) >= count else None


def mean(points: Points) -> float:
    """Return the mean value of at least one point."""
    return fmean(value for _, value in points)


class History:
    """A run so far: what was known before, and every logged line.

    A field is looked up by its logged name, ``history["rewards/margins"]``; evaluation's begin with ``eval_``. A field
    that was never logged is an empty series.

    Args:
        audits: Values of `dpo_plugin.data.audit.Audit.to_dict` of the training data.

    Attributes:
        step: The last logged step.
        not_finite: Field → first step and number of lines with NaN or infinity; the series leave these out.
    """

    def __init__(self, facts: RunFacts | None = None, audits: Sequence[Mapping[str, Any]] = ()):
        self.facts = facts or RunFacts()
        self.audits = audits
        self.step = 0
        self.not_finite: dict[str, tuple[int, int]] = {}
        self._series: defaultdict[str, Series] = defaultdict(Series)
        self._rate_by_steps = 0.0
        self._peak_rate = 0.0

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a logged line: ``step`` and any number of fields. Non-numeric values are skipped."""
        step = line.get("step")
        if not isinstance(step, int):
            return
        self._add_rate(step, line.get(RATE))
        for name, value in line.items():
            if (type(value) is not float and type(value) is not int) or name == "step":
                continue
            if math.isfinite(value):
                series = self._series[name]
                series.steps.append(step)
                series.values.append(value)
            else:
                first, lines = self.not_finite.get(name, (step, 0))
                self.not_finite[name] = first, lines + 1
        self.step = max(self.step, step)

    def _add_rate(self, step: int, rate: Any) -> None:
        if not isinstance(rate, (float, int)) or not math.isfinite(rate):
            return
        before = self[RATE].tail(1)
        self._rate_by_steps += rate * (step - (before[0][0] if before else 0))
        self._peak_rate = max(self._peak_rate, rate)

    def __getitem__(self, name: str) -> Series:
        return self._series[name] if name in self._series else Series()

    def __contains__(self, name: str) -> bool:
        return name in self._series

    def names(self) -> list[str]:
        """Every field that was logged."""
        return list(self._series)

    def full_rate_steps(self) -> float:
        """Return the steps so far in steps at the peak learning rate; those of the warm-up count for less."""
        peak = self.rate()
        return self._rate_by_steps / peak if peak and RATE in self else float(self.step)

    def learned_enough(self, share: float) -> bool:
        """Whether `full_rate_steps` has reached this share of the planned steps, and 30 steps."""
        return self.full_rate_steps() >= max(30.0, share * (self.facts.planned_steps or 0))

    def rate(self) -> float:
        """The peak learning rate, 0 if it is not known."""
        return self.facts.learning_rate or self._peak_rate

    def progress(self) -> float | None:
        """Share of the planned steps that is done, or None if the plan is not known."""
        return self.step / self.facts.planned_steps if self.facts.planned_steps else None
