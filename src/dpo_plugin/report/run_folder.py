"""Read what a run left in its output folder: log, settings, findings, data audit, samples.

A log that was cut short, or that another trainer wrote, is read as far as it goes, and what is missing is said.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_plugin.errors import DataError
from dpo_plugin.health.checks import CHECKS
from dpo_plugin.health.history import History
from dpo_plugin.health.monitor import HealthCheck, replay, switched_on
from dpo_plugin.report.shown import shown_settings
from dpo_plugin.report.spreads import read_rewards
from dpo_plugin.types import Finding, RunFacts

LOG = "dpo_log.jsonl"
"""One logged line per line."""

RUN = "dpo_run.json"
"""``facts`` (`RunFacts.to_dict`), ``config`` (the validated YAML) and ``findings`` (`Finding.to_dict`)."""

AUDIT = "data_audit.json"
SAMPLES = "samples.jsonl"
STATE = "trainer_state.json"

_STEP_NAMES = ("step", "global_step", "_step", "current_steps", "train/global_step", "iteration", "iter")
_RENAMED = {"lr": "learning_rate", "train_loss_step": "loss", "rewards/accuracy": "rewards/accuracies",
            "rewards/margin": "rewards/margins", "reward_accuracy": "rewards/accuracies"}  # fmt: skip


@dataclass
class RunRecord:
    """One run, as far as its folder tells.

    Attributes:
        name: What the report calls it.
        history: Facts, audits and every logged line.
        findings: What the health checks found, errors first.
        config: The run's settings, flat or nested, for reading.
        samples: Rows with ``prompt``, ``policy`` and ``reference``, and whatever else is to be shown.
        rewards: As `dpo_plugin.report.spreads.reward_charts` takes them.
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
        checks: Health checks that are run on the log if no findings were written; not those that the run's config has
            switched off.
        owner: Name of a check → who registered it, for the finding about a check that fails.

    Raises:
        DataError: If there is no log, or nothing can be read of it.
    """
    with _without_collector():
        return _read_run(Path(output_dir), checks, owner)


@contextmanager
def _without_collector() -> Iterator[None]:
    """A hundred thousand new dicts are no garbage, and looking for some among them takes a fifth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _read_run(folder: Path, checks: Mapping[str, HealthCheck], owner: Callable[[str], str]) -> RunRecord:
    notes: list[str] = []
    if not folder.is_dir():
        raise DataError(f"`{folder}` is not a folder. Write the `output_dir` of a run: axolotl dpo report <output_dir>")
    lines, facts, read = _read_log(folder, notes)
    run = _read_json(folder / RUN, notes) or {}
    audits = _list((_read_json(folder / AUDIT, notes) or {}).get("datasets"))
    facts |= {key: value for key, value in _mapping(run.get("facts")).items() if value is not None}
    lines = list(_one_line_per_step(lines, notes))
    facts.setdefault("planned_steps", lines[-1]["step"] if lines else None)
    history = History(RunFacts.from_dict(facts), audits)
    try:
        findings = [Finding.from_dict(found) for found in run["findings"]]
    except (KeyError, TypeError, AttributeError):  # none were written, or not by us
        findings = replay(switched_on(checks, _mapping(run.get("config"))), history, lines, owner)
    else:
        for line in lines:
            history.add(line)
    _say_what_is_missing(history, notes)
    config = shown_settings(_mapping(run.get("config")))  # an older file has all of them
    samples = [row for row in _read_lines(folder / SAMPLES, notes) if "prompt" in row]
    return RunRecord(
        folder.resolve().name, history, findings, config, samples, read, notes, read_rewards(run.get("rewards"))
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def log_text(line: Mapping[str, Any]) -> str:
    """A logged line as `LOG` has it: JSON with six digits, which is what fp32 holds, and a line break."""

    def short(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value

    return json.dumps({name: short(value) for name, value in line.items()}, separators=(",", ":")) + "\n"


# ── the log ──


def _read_log(folder: Path, notes: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """The logged lines, what the file says of the plan, and the file's name."""
    lines = list(_read_lines(folder / LOG, notes))
    if lines:
        state = next(iter(_states(folder)), None)
        return lines, _plan(_read_json(state, []) or {}) if state else {}, LOG
    for path in _states(folder):
        lines, facts = _read_state(path, notes)
        if lines:
            return lines, facts, str(path.relative_to(folder))
    for path in sorted(folder.glob("*.jsonl")):
        if path.name != SAMPLES and (lines := [line for line in _read_lines(path, notes) if "loss" in _renamed(line)]):
            notes.append(f"The log is {path.name}, which another trainer wrote.")
            return lines, {}, path.name
    raise DataError(
        f"no log in `{folder}`: neither {LOG} nor {STATE} there or in a checkpoint"
        + ("; " + " ".join(notes) if notes else "")
        + ". A run writes it while it trains. Write: logging_steps: 1"
    )


def _states(folder: Path) -> list[Path]:
    """Trainer states, the furthest first."""
    found = [path for path in folder.glob(f"checkpoint-*/{STATE}") if path.parent.name.split("-")[-1].isdigit()]
    found.sort(key=lambda path: int(path.parent.name.split("-")[-1]), reverse=True)
    return [*found, *(path for path in [folder / STATE] if path.is_file())]


def _plan(state: Mapping[str, Any]) -> dict[str, Any]:
    found = {"planned_steps": state.get("max_steps"), "epochs": state.get("num_train_epochs")}
    return {key: value for key, value in found.items() if isinstance(value, (int, float)) and value > 0}


def _read_state(path: Path, notes: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Lines and plan of a trainer state; of one that is cut, the lines before the cut."""
    text = path.read_text(encoding="utf-8", errors="replace")
    where = f"{path.parent.name}/{path.name}"
    try:
        state = json.loads(text)
        if not isinstance(state, dict):
            raise ValueError("no object")
        lines = state.get("log_history") or []
    except ValueError:
        state, lines = {}, list(_objects_after(text, '"log_history"'))
        notes.append(f"{where} is cut or damaged; {len(lines)} logged lines could be read of it.")
    return [line for line in lines if isinstance(line, dict)], _plan(state)


def _objects_after(text: str, mark: str) -> Iterator[dict[str, Any]]:
    """The whole objects of a JSON list that begins after a mark, up to where the text is cut."""
    start = text.find(mark)
    at = text.find("[", start) + 1 if start >= 0 else 0
    decoder = json.JSONDecoder()
    while at > 0 and (begin := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, begin)
        except ValueError:
            return
        yield value
        if text[at : at + 1] != ",":
            return


def _read_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; lines that are none are counted and passed over."""
    if not path.is_file():
        return
    bad = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                bad += bool(text.strip())
                continue
            if isinstance(line, dict):
                yield line
    if bad:
        notes.append(f"{path.name}: {bad} line{'s' * (bad > 1)} cut or damaged and left out.")


def _read_json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        notes.append(f"{path.name} is cut or damaged and was left out.")
        return None
    return value if isinstance(value, dict) else None


# ── lines ──


def _renamed(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of another trainer or logger under our names; numbers written as text become numbers."""
    found: dict[str, Any] = {}
    for name, value in line.items():
        if name.startswith("eval/"):
            name = "eval_" + name[5:]
        name = name.removeprefix("train/")
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                continue
        found[_RENAMED.get(name, name)] = value
    return found


def _one_line_per_step(lines: Iterable[dict[str, Any]], notes: list[str]) -> Iterator[dict[str, Any]]:
    """Lines in the order of steps under our names; where a resumed run took a step again, its later line."""
    ordered = [
        line if type(line.get("step")) is int and type(line.get("loss")) is float else _named(line) for line in lines
    ]
    if ordered and not any("step" in line for line in ordered):
        notes.append("The log has no steps; its lines are numbered instead.")
        ordered = [{**line, "step": number} for number, line in enumerate(ordered, 1)]
    kept: list[dict[str, Any]] = []
    for line in reversed([line for line in ordered if "step" in line]):
        if not kept or line["step"] < kept[-1]["step"] or _goes_with(line, kept):
            kept.append(line)
    if len(kept) < len(ordered):
        notes.append(f"{len(ordered) - len(kept)} lines from before a resume, or without a step, are left out.")
    return iter(kept[::-1])


def _goes_with(line: Mapping[str, Any], kept: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a line is of the same step as the last ones and has other fields, as training and evaluation lines do."""
    for other in reversed(kept):
        if other["step"] != line["step"]:
            return other is not kept[-1]
        if len(line.keys() & other.keys() - {"step", "epoch"}):
            return False
    return True


def _named(line: Mapping[str, Any]) -> dict[str, Any]:
    found = _renamed(line)
    for name in _STEP_NAMES:
        step = found.get(name)
        if isinstance(step, (int, float)) and float(step).is_integer():
            return {**found, "step": int(step)}
    return found


def _say_what_is_missing(history: History, notes: list[str]) -> None:
    if "rewards/margins" in history or "eval_rewards/margins" in history:
        if "logps/chosen_displacement" not in history:
            notes.append(
                "The log is another trainer's or an older one: percentiles, sources and lengths are not in it."
            )
    else:
        notes.append(
            "The log has no rewards, so it is not one of preference training with a reference: what it has is drawn, "
            "and the checks that need rewards were not made."
        )
