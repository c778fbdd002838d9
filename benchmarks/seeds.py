"""Runs that differ in their seed alone: a healthy run must raise no finding of the health checks.

The demo's DPO on its SFT adapter, or with `--full` the same data on all weights of the merged SFT model. Needs what
`make demo` has made, outputs/tiny-base and outputs/tiny-sft, and for `--full` also
`axolotl merge-lora recipes/tiny-sft.yaml`.

    python benchmarks/seeds.py --seeds 10 --json benchmarks/seeds.json
    python benchmarks/seeds.py --seeds 10 --full --json benchmarks/seeds_full.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]


def config(full: bool, seed: int, folder: Path) -> Path:
    """A YAML in the folder: recipes/tiny-dpo.yaml with a seed, logged at each step so that windows are full."""
    settings = yaml.safe_load((ROOT / "recipes/tiny-dpo.yaml").read_text(encoding="utf-8"))
    settings |= {"seed": seed, "output_dir": str(folder / "out"), "eval_strategy": "steps", "eval_steps": 8}
    settings |= {"logging_steps": 1, "save_strategy": "no"}
    if full:
        settings = {key: value for key, value in settings.items() if key != "adapter" and not key.startswith("lora_")}
        settings |= {"base_model": "./outputs/tiny-sft/merged", "learning_rate": 1e-4}
    file = folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


def run(full: bool, seed: int, folder: Path) -> dict[str, Any]:
    """Train with a seed, and read what the run left."""
    axolotl = str(Path(sys.executable).with_name("axolotl"))
    command = [axolotl, "train", str(config(full, seed, folder))]
    folder = folder / "out"
    offline = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"seed {seed} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    findings = json.loads((folder / "dpo_run.json").read_text(encoding="utf-8"))["findings"]
    lines = [json.loads(line) for line in (folder / "dpo_log.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = [line for line in lines if "eval_loss" in line][-1]
    return {
        "seed": seed,
        "findings": [finding["check"] for finding in findings],
        "held_out_loss": held_out["eval_loss"],
        "held_out_accuracy": held_out["eval_rewards/accuracies"],
        "held_out_margin": held_out["eval_rewards/margins"],
    }


def main() -> int:
    """Print a line per seed; exit 1 if there was a finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--full", action="store_true", help="train all weights instead of an adapter")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    table = Table("seed", "held-out loss", "accuracy", "margin", "findings")
    found = []
    for seed in range(1, arguments.seeds + 1):
        with tempfile.TemporaryDirectory() as folder:
            one = run(arguments.full, seed, Path(folder))
        found.append(one)
        figures = [f"{one[key]:.3f}" for key in ("held_out_loss", "held_out_accuracy", "held_out_margin")]
        table.add_row(str(seed), *figures, ", ".join(one["findings"]) or "none")
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    Console(soft_wrap=True).print(table)
    return int(any(one["findings"] for one in found))


if __name__ == "__main__":
    sys.exit(main())
