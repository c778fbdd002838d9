"""The tiny recipe prints one curve on every host: its first losses against those in tests/data/tiny_curve.json.

Where the curve is meant to change: python -m tests.integration.test_one_curve
"""

import hashlib
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.support import host
from tests.support.tiny import ROOT, save_adapter, save_base

STEPS, BOUND = 20, 1e-5
FILE = ROOT / "tests/data/tiny_curve.json"


def redraw(folder: Path, file: str, spread: float, seed: int) -> Path:
    """Replace all weights by draws of numpy's frozen generator (NEP 19); torch promises its own for no other platform."""
    draw, tensors = np.random.RandomState(seed), load_file(folder / file)
    for name in sorted(tensors):
        values = draw.uniform(-spread, spread, tensors[name].shape).astype(np.float32)
        tensors[name] = torch.from_numpy(values) + ("norm" in name)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def train_tiny_recipe(folder: Path) -> host.Run:
    config = yaml.safe_load((ROOT / "recipes/tiny-dpo.yaml").read_text(encoding="utf-8"))
    base = redraw(save_base(folder / "base"), "model.safetensors", 0.035, seed=0)
    sft = save_adapter(base, folder / "sft", r=config["lora_r"], lora_alpha=config["lora_alpha"])
    config |= {
        "base_model": str(base),
        "lora_model_dir": str(redraw(sft, "adapter_model.safetensors", 0.09, seed=1)),
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "logging_steps": 1,
        "max_steps": STEPS,
        "save_strategy": "no",
    }
    for entry in (*config["datasets"], *config["test_datasets"]):
        entry["path"] = str(ROOT / entry["path"])
    return host.train(config, folder)


def curve(run: host.Run) -> dict[str, object]:
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    ids = json.dumps([[row[name] for name in columns] for row in run.trainer.train_dataset])
    return {"token_ids": hashlib.sha256(ids.encode()).hexdigest(), "losses": [line["loss"] for line in run.lines]}


@pytest.mark.core
def test_the_first_losses_are_those_of_other_hosts(tmp_path):
    found, stored = curve(train_tiny_recipe(tmp_path)), json.loads(FILE.read_text(encoding="utf-8"))
    assert found["token_ids"] == stored["token_ids"]
    apart = [abs(one - other) for one, other in zip(found["losses"], stored["losses"], strict=True)]
    print({"largest difference": max(apart), "made on": stored["made_on"]})
    assert len(apart) == STEPS
    assert max(apart) <= BOUND
    assert stored["losses"][0] - stored["losses"][-1] > 0.05


if __name__ == "__main__":
    packages = ("axolotl", "trl", "transformers", "peft", "torch")
    with tempfile.TemporaryDirectory() as folder:
        made = curve(train_tiny_recipe(Path(folder)))
    made_on = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    how = f"python -m tests.integration.test_one_curve: recipes/tiny-dpo.yaml, {STEPS} steps, weights drawn by numpy"
    FILE.write_text(json.dumps({"made_by": how, "made_on": made_on, **made}, indent=1) + "\n", encoding="utf-8")
    sys.exit()
