"""Runs that are killed at a random moment and started again: each ends with the weights and losses of the unbroken one.

`python -m tests.fuzz.kills --cases 20` runs a campaign, of about half a minute each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from tests.support import tiny

STEPS = 10


def config(base: Path, sft: Path, folder: Path) -> dict[str, Any]:
    """A run of `STEPS` steps with dropout, which the generators' states must survive; a checkpoint at every second."""
    rows = [tiny.chat_row(f"Question {n}?", f"Good answer {n}.", f"Bad {n}.", "ab"[n % 2]) for n in range(4 * STEPS)]
    data = {"path": str(tiny.write_rows(folder / "rows.jsonl", rows)), "ds_type": "json", "type": "dpo_plugin.chat"}
    settings = {
        "datasets": [data],
        "dataset_prepared_path": str(folder / "prepared"),
        "lora_model_dir": str(sft),
        "lora_dropout": 0.1,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "num_epochs": 1,
        "max_steps": STEPS,
        "auto_resume_from_checkpoints": True,
    }
    return tiny.dpo_config(base, folder / "out", **settings)


def start(folder: Path) -> subprocess.Popen[bytes]:
    """`axolotl train` in a process group of its own."""
    line = [sys.executable, "-m", "axolotl.cli.main", "train", str(folder / "config.yaml"), "--launcher", "python"]
    with (folder / "said").open("ab") as said:
        return subprocess.Popen(line, cwd=folder, stdout=said, stderr=said, start_new_session=True)


def steps_logged(folder: Path) -> int:
    """How many steps the log of a run has."""
    log = folder / "out/dpo_log.jsonl"
    return sum('"loss"' in line for line in log.read_text(encoding="utf-8").splitlines()) if log.is_file() else 0


def kill(process: subprocess.Popen[bytes], folder: Path, steps: int, seconds: float) -> bool:
    """Kill a run with all its processes, some seconds after it has logged some steps; says whether it was running."""
    while process.poll() is None and steps_logged(folder) < steps:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    alive = process.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return alive


def outcome(folder: Path) -> tuple[bytes, list[tuple[int, float]]]:
    """The adapter's bytes, and step and loss of every line."""
    lines = [json.loads(line) for line in (folder / "out/dpo_log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    return (folder / "out/adapter_model.safetensors").read_bytes(), losses


def whole_run(folder: Path, base: Path, sft: Path) -> None:
    """Write a folder's config and train to the end, going on from what is there.

    Raises:
        AssertionError: With what it said, if it fails.
    """
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(base, sft, folder)), encoding="utf-8")
    assert start(folder).wait(600) == 0, (folder / "said").read_text(errors="replace")[-3000:]


def campaign(seed: int, count: int) -> Counter[str]:
    """Kill at least ``count`` times, a run once or twice; returns how many kills came after how many steps."""
    draw, found = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as made:
        base, sft = tiny.save_base(Path(made) / "base"), Path(made) / "sft"
        tiny.save_adapter(base, sft)
        began = time.monotonic()
        whole_run(Path(made) / "whole", base, sft)
        seconds, expected = time.monotonic() - began, outcome(Path(made) / "whole")
        while found.total() < count:
            folder = Path(made) / f"killed-{found.total()}"
            folder.mkdir()
            (folder / "config.yaml").write_text(yaml.safe_dump(config(base, sft, folder)), encoding="utf-8")
            for _ in range(draw.choice([1, 1, 2])):
                steps = draw.choice([0, *range(1, STEPS + 1)])
                if kill(start(folder), folder, steps, draw.uniform(0, 0.2 if steps else seconds)):
                    found[f"killed after {steps_logged(folder):2d} steps"] += 1
            whole_run(folder, base, sft)
            assert outcome(folder) == expected, f"{folder.name}: {dict(found)}"
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for what, number in sorted(campaign(arguments.seed, arguments.cases).items()):
        print(f"{number:6d}  {what}")
