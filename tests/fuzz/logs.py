"""Damaged logs of a run: the report says what it could not read, or that there is nothing to read; never bare.

`python -m tests.fuzz.logs --cases 500` runs a campaign.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from dpo_plugin.errors import DPOPluginError
from dpo_plugin.report.report import write_report
from dpo_plugin.report.run_folder import AUDIT, LOG, RUN, SAMPLES, read_run
from tests.fuzz.checkpoints import damage
from tests.unit.health.test_health import recorded
from tests.unit.report.test_report import folder as recorded_folder
from tests.unit.report.test_report import state

FILES = (LOG, RUN, AUDIT, SAMPLES, "checkpoint-4/trainer_state.json")


def whole_folder(path: Path) -> Path:
    """An output folder with every file that the report reads."""
    recorded_folder(path)
    state(path / "checkpoint-4", recorded("healthy")[0])
    answers = {"prompt": "Q?", "question": "Q?", "policy": "Yes.", "reference": "No.", "margin": 0.5}
    rows = [json.dumps({"step": step, **answers}) for step in (2, 4)]
    (path / SAMPLES).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def check(whole: Path, place: Path, file: str, seed: int) -> str:
    """What the report of a run with one or two damaged files says: ``written``, or the name of the error."""
    draw = random.Random(seed)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place)
    done = [damage(place / one, draw) for one in {file, draw.choice(FILES)}]
    try:
        page = write_report([read_run(place)], place / "report.html").read_text(encoding="utf-8")
    except DPOPluginError as error:
        return type(error).__name__ if len(str(error)) < 500 else "too long an error"
    assert page.rstrip().endswith("</html>"), done
    assert "<script" not in page, done
    return "written"


def campaign(seed: int, count: int) -> Counter[str]:
    """Run cases; returns how many ended how."""
    draw, found = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        whole = whole_folder(Path(folder) / "whole")
        for number in range(count):
            file, own = FILES[number % len(FILES)], draw.randrange(2**32)
            try:
                found[f"{file}: {check(whole, Path(folder) / 'case', file, own)}"] += 1
            except Exception as error:
                error.add_note(f"{file}, seed {own}")
                raise
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for outcome, number in sorted(campaign(arguments.seed, arguments.cases).items()):
        print(f"{number:6d}  {outcome}")
