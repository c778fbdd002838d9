"""Read what a run left in its output folder: log, settings, findings, data audit, samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_plugin.errors import DataError
from dpo_plugin.health.checks import CHECKS
from dpo_plugin.health.history import History
from dpo_plugin.health.monitor import HealthCheck, replay, switched_on
from dpo_plugin.report.run_files import AUDIT, RUN, SAMPLES, objects, read_json, read_lines, read_log
from dpo_plugin.report.shown import shown_settings
from dpo_plugin.types import Finding, RunFacts


@dataclass
class RunRecord:
    """One run, as far as its folder tells.

    Attributes:
        name: What the report calls it.
        history: Facts, audits and every logged line.
        findings: What the health checks found, errors first.
        config: The run's settings, flat or nested, for reading.
        samples: Rows with ``prompt``, ``policy`` and ``reference``, and whatever else is to be shown.
        rewards: As `dpo_plugin.report.panels.reward_charts` takes them.
        read: The file that the log comes from.
        notes: What was missing or damaged, in sentences.
    """

    name: str
    history: History
    findings: list[Finding] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    read: str = ""
    notes: list[str] = field(default_factory=list)
    rewards: Mapping[str, Any] = field(default_factory=dict)


def read_run(
    output_dir: str | Path,
    checks: Mapping[str, HealthCheck] = CHECKS,
    owner: Callable[[str], str] = lambda _: "dpo_plugin",
) -> RunRecord:
    """Read a run's output folder.

    Args:
        output_dir: With ``dpo_log.jsonl``, or with a ``trainer_state.json`` in it or in a checkpoint.
        checks: Health checks that are run on the log if no findings were written, as after a run that was killed; not
            those that the run's config switches off.
        owner: Name of a check → who registered it, for the finding about a check that fails.

    Raises:
        DataError: If there is no log, or nothing can be read of it.
    """
    folder, notes = Path(output_dir), list[str]()
    if not folder.is_dir():
        raise DataError(f"`{folder}` is not a folder. Write the `output_dir` of a run: axolotl dpo report <output_dir>")
    lines, plan, read = read_log(folder, notes)
    run = read_json(folder / RUN, notes)
    config = _mapping(run.get("config"))
    known = {key: value for key, value in _mapping(run.get("facts")).items() if value is not None}
    facts = RunFacts.from_dict({"planned_steps": lines[-1].get("step"), **plan, **known})
    history = History(facts, objects(read_json(folder / AUDIT, notes).get("datasets")))
    try:
        findings = [Finding.from_dict(found) for found in run["findings"]]
    except (KeyError, TypeError, AttributeError):  # the run was killed before it wrote them
        findings = replay(switched_on(checks, config), history, lines, owner)
    else:
        for line in lines:
            history.add(line)
    if "rewards/margins" in history and "logps/chosen_displacement" not in history:
        notes.append("The log is another trainer's or an older one: percentiles, sources and lengths are not in it.")
    return RunRecord(
        folder.resolve().name,
        history,
        findings,
        shown_settings(config),  # again: an older file has all of them
        [row for row in read_lines(folder / SAMPLES, notes) if "prompt" in row],
        read,
        notes,
        _mapping(run.get("rewards")),
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
