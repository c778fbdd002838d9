"""What a run leaves in its output folder for its report: log, settings, findings, data audit, samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_plugin.errors import DataError
from dpo_plugin.health.checks import CHECKS
from dpo_plugin.health.history import History
from dpo_plugin.health.monitor import HealthCheck, replay, switched_on
from dpo_plugin.report.shown import shown_settings
from dpo_plugin.types import Finding, RunFacts

LOG = "dpo_log.jsonl"
"""One logged line per line."""

RUN = "dpo_run.json"
"""``facts`` (`RunFacts.to_dict`), ``config`` (the settings that may be shown), ``findings`` (`Finding.to_dict`) and
``rewards`` of single pairs."""

AUDIT = "data_audit.json"
SAMPLES = "samples.jsonl"
STATE = "trainer_state.json"


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


def log_text(line: Mapping[str, Any]) -> str:
    """Format a logged line as `LOG` has it: JSON with six digits, which is what fp32 holds, and a line break."""

    def short(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value

    return json.dumps({name: short(value) for name, value in line.items()}, separators=(",", ":")) + "\n"


def read_log(folder: Path, notes: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """Read the logged lines of a run, from `LOG` or, where only a checkpoint was kept, from its trainer state.

    Returns:
        The lines, what the file says of the plan (``planned_steps``, ``epochs``), and the file's name.

    Raises:
        DataError: If there is no log.
    """
    if lines := read_lines(folder / LOG, notes):
        return lines, {}, LOG
    states = folder.glob(f"checkpoint-[0-9]*/{STATE}")
    furthest = max(states, key=lambda path: (len(path.parent.name), path.parent.name), default=folder / STATE)
    state = read_json(furthest, notes)
    if lines := objects(state.get("log_history")):
        plan = {"planned_steps": state.get("max_steps"), "epochs": state.get("num_train_epochs")}
        return lines, plan, str(furthest.relative_to(folder))
    raise DataError(
        f"no log in `{folder}`: neither {LOG} nor {STATE} there or in a checkpoint"
        + ("; " + " ".join(notes) if notes else "")
        + ". A run writes it while it trains. Write: logging_steps: 1"
    )


def read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file; lines that are not valid JSON, as a killed run's last, are noted."""
    found, bad = [], 0
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            found.append(json.loads(text))
        except (ValueError, RecursionError):
            bad += bool(text.strip())
    if bad:
        notes.append(f"{path.name}: {bad} incomplete or damaged line{'s' * (bad > 1)} left out.")
    return objects(found)


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read a JSON object; empty where the file is missing, holds something else, or is damaged, which is noted."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else {}
    except (ValueError, RecursionError):
        notes.append(f"{path.name} is incomplete or damaged and was left out.")
        return {}
    return value if isinstance(value, dict) else {}


def objects(value: Any) -> list[dict[str, Any]]:
    """The JSON objects of a list; none of what is not a list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
