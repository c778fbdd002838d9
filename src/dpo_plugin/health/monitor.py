"""Health checks: what one is, and the monitor that runs them at each logging step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_plugin.health.history import History
from dpo_plugin.types import Finding, Severity

HealthCheck = Callable[[History], Finding | None]

STOPS = 200
"""How often a finished run is checked, at evenly spaced lines; a brief fault may fall between two of them."""


@dataclass(frozen=True, slots=True)
class Symptom:
    """What a rule found.

    Attributes:
        first_step: First step at which the rule held.
        message: What was found, in a sentence without a full stop.
        numbers: The figures that show it.
        suggestion: The line to write, as the YAML has it.
    """

    first_step: int
    message: str
    numbers: Mapping[str, float]
    suggestion: str


@dataclass(frozen=True)
class Check:
    """A rule with its threshold, window, source and advice; a `HealthCheck`.

    Attributes:
        find: The rule; it reads no more of the run than ``window`` lines, so its cost does not grow with the run.
        severity: How bad it is.
        threshold: The number that the rule compares with, in the unit that docs/health.md names.
        window: How many of the last log lines the rule looks at; 0 if it looks at none.
        source: Where the rule or its threshold comes from.
        advice: What to change, in sentences.
    """

    find: Callable[[History, Check], Symptom | None]
    severity: Severity
    threshold: float
    window: int
    source: str
    advice: str

    def __call__(self, history: History) -> Finding | None:
        """Apply the rule."""
        symptom = self.find(history, self)
        if symptom is None:
            return None
        advice = f"{self.advice} Write: {symptom.suggestion}"
        return Finding(symptom.message, advice, self.severity, symptom.first_step, symptom.numbers)


def short(number: float) -> str:
    """A number in two digits, for a sentence."""
    return f"{number:.2g}"


def scaled_rate(history: History, factor: float) -> str:
    """The line that writes a multiple of the present learning rate."""
    return f"learning_rate: {history.rate() * factor or 5e-6:.1g}"


class HealthMonitor:
    """Run health checks on a growing history and keep their findings.

    Args:
        history: The run so far; its lines are checked with the next one.
        owner: Name of a check → who registered it, for the finding about a check that fails.

    Attributes:
        findings: Check → its latest finding, with the first and last step at which it was so.
    """

    def __init__(
        self, checks: Mapping[str, HealthCheck], history: History, owner: Callable[[str], str] = lambda _: "dpo_plugin"
    ):
        self.history = history
        self.findings: dict[str, Finding] = {}
        self._checks = dict(checks)
        self._owner = owner

    def add(self, line: Mapping[str, Any]) -> list[Finding]:
        """Add a logged line and run every check.

        Returns:
            The findings of checks that had found nothing so far.
        """
        self.history.add(line)
        return self.check()

    def check(self) -> list[Finding]:
        """Run every check on the history as it is; return the findings of checks that had found nothing so far."""
        new = []
        for name in list(self._checks):
            found = self._run(name)
            if found is None:
                continue
            known = self.findings.get(name)
            first = found.first_step if known is None else min(found.first_step, known.first_step)
            self.findings[name] = replace(found, check=name, first_step=first, last_step=self.history.step)
            if known is None:
                new.append(self.findings[name])
        return new

    def _run(self, name: str) -> Finding | None:
        """Run a check; one that fails becomes a finding and is not run again, since it must not end a run of days."""
        try:
            found: Any = self._checks[name](self.history)
            if found is None or isinstance(found, Finding):
                return found
            problem = f"returned {type(found).__name__}, not a Finding or None"
        except Exception as error:
            problem = f"raised {type(error).__name__}: {error}"
        del self._checks[name]
        return Finding(
            f"the health check {name!r} of {self._owner(name)} {problem}; it is off for the rest of the run",
            "Update or uninstall the package that brought it. "
            f"Write: def {name}(history) -> Finding | None, and return None where a field is missing",
            first_step=self.history.step,
        )


def switched_on(checks: Mapping[str, HealthCheck], config: Mapping[str, Any]) -> dict[str, HealthCheck]:
    """Leave out the checks that ``dpo_plugin.health`` in a run's config switches off; a damaged section has no say."""
    section = config.get("dpo_plugin")
    health = section.get("health") if isinstance(section, Mapping) else None
    actions = health.get("checks") if isinstance(health, Mapping) else None
    default = health.get("action") if isinstance(health, Mapping) else None
    single = actions if isinstance(actions, Mapping) else {}
    return {name: check for name, check in checks.items() if single.get(name, default) not in ("off", False)}


def replay(
    checks: Mapping[str, HealthCheck],
    history: History,
    lines: Sequence[Mapping[str, Any]],
    owner: Callable[[str], str] = lambda _: "dpo_plugin",
) -> list[Finding]:
    """Add a finished run's lines to an empty history and check it on the way; findings are as `in_order` sorts them."""
    monitor = HealthMonitor(checks, history, owner)
    every = max(1, len(lines) // STOPS)
    for number, line in enumerate(lines, 1):
        history.add(line)
        if number % every == 0 or number == len(lines):
            monitor.check()
    return in_order(monitor.findings.values())


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings: errors first, then by their first step."""
    return sorted(findings, key=lambda found: (found.severity != "error", found.first_step, found.check))
