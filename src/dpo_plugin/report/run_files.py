"""The files of an output folder that a report is made of: their names, and how they are written and read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_plugin.errors import DataError

LOG = "dpo_log.jsonl"
"""One logged line per line."""

RUN = "dpo_run.json"
"""``facts`` (`RunFacts.to_dict`), ``config`` (the settings that may be shown), ``findings`` (`Finding.to_dict`) and
``rewards`` of single pairs."""

AUDIT = "data_audit.json"
SAMPLES = "samples.jsonl"
STATE = "trainer_state.json"


def log_text(line: Mapping[str, Any]) -> str:
    """Format a logged line as `LOG` has it: JSON with six digits, which is what fp32 holds, and a line break."""

    def short(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value

    return json.dumps({name: short(value) for name, value in line.items()}, separators=(",", ":")) + "\n"


def read_log(folder: Path, notes: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """Read the logged lines of a run, from `LOG` or, where only a checkpoint was kept, from its trainer state.

    Args:
        folder: The output folder, or a checkpoint.
        notes: Sentences about what is damaged are added to it.

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
        except ValueError:
            bad += bool(text.strip())
    if bad:
        notes.append(f"{path.name}: {bad} incomplete or damaged line{'s' * (bad > 1)} left out.")
    return objects(found)


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read a JSON object; empty where the file is missing, holds something else, or is damaged, which is noted."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else {}
    except ValueError:
        notes.append(f"{path.name} is incomplete or damaged and was left out.")
        return {}
    return value if isinstance(value, dict) else {}


def objects(value: Any) -> list[dict[str, Any]]:
    """The JSON objects of a list; none of what is not a list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
