"""Health checks: what one is, and the monitor that runs them at each logging step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_plugin.health.history import History
from dpo_plugin.types import Finding, Severity

HealthCheck = Callable[[History], Finding | None]


@dataclass(frozen=True, slots=True)
class Symptom:
    """What a rule saw.

    Attributes:
        since: First step at which it was so.
        what: What was found, in a sentence without a full stop.
        numbers: What it was found by.
        write: The line to write, as the YAML has it.
    """

    since: int
    what: str
    numbers: Mapping[str, float]
    write: str


@dataclass(frozen=True)
class Check:
    """A rule with all that is to be known of it; a `HealthCheck`.

    Attributes:
        find: The rule; sees the run and this check's threshold and window, so its cost does not grow with the run.
        severity: How bad it is.
        rule: The rule in words.
        threshold: The number that the rule compares with, in the unit that ``rule`` names.
        window: How many of the last log lines the rule looks at; 0 if it looks at none.
        source: Where the rule or its threshold comes from.
        advice: What to change, in sentences.
    """

    find: Callable[[History, Check], Symptom | None]
    severity: Severity
    rule: str
    threshold: float
    window: int
    source: str
    advice: str

    def __call__(self, history: History) -> Finding | None:
        """Apply the rule."""
        symptom = self.find(history, self)
        if symptom is None:
            return None
        advice = f"{self.advice} Write: {symptom.write}"
        return Finding(symptom.what, advice, self.severity, symptom.since, symptom.numbers)


def short(number: float) -> str:
    """A number in two digits, for a sentence."""
    return f"{number:.2g}"


def scaled_rate(history: History, factor: float) -> str:
    """The line that writes a multiple of the present learning rate."""
    return f"learning_rate: {history.rate() * factor or 5e-6:.1g}"


class HealthMonitor:
    """Runs health checks on a growing history and keeps what they found.

    Args:
        checks: Name → health check.
        history: The run so far; its lines are checked with the next one.
        owner: Name of a check → who registered it, for the finding about a check that fails.

    Attributes:
        history: The run so far.
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
        """Take in a logged line and run every check.

        Returns:
            Findings of checks that had found nothing before.
        """
        self.history.add(line)
        return self.check()

    def check(self) -> list[Finding]:
        """Run every check on the history as it is; returns the findings of checks that had found nothing before."""
        new = []
        for name in list(self._checks):
            found = self._run(name)
            if found is None:
                continue
            known = self.findings.get(name)
            since = found.since if known is None else min(found.since, known.since)
            self.findings[name] = replace(found, check=name, since=since, last=self.history.step)
            if known is None:
                new.append(self.findings[name])
        return new

    def _run(self, name: str) -> Finding | None:
        """A check that fails is a finding itself, and is not run again: it must not end a run of days."""
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
            since=self.history.step,
        )


def switched_on(checks: Mapping[str, HealthCheck], config: Mapping[str, Any]) -> dict[str, HealthCheck]:
    """The checks without those that ``dpo_plugin.health`` in a run's config switches off.

    A damaged section switches nothing off.
    """
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
    stops: int = 200,
) -> list[Finding]:
    """Run the checks on a finished run as they would have seen it, at evenly spaced lines.

    Args:
        checks: Name → health check.
        history: Without lines; takes in all of them.
        lines: All logged lines.
        owner: As in `HealthMonitor`.
        stops: How often the checks are run; more find a passing fault with more certainty.

    Returns:
        The findings, worst and earliest first.
    """
    monitor = HealthMonitor(checks, history, owner)
    every = max(1, len(lines) // stops)
    for number, line in enumerate(lines, 1):
        history.add(line)
        if number % every == 0 or number == len(lines):
            monitor.check()
    return in_order(monitor.findings.values())


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Findings, errors first, then by the step since which they hold."""
    return sorted(findings, key=lambda found: (found.severity != "error", found.since, found.check))
