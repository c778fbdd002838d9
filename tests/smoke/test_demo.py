"""The demo as a newcomer runs it: the shipped recipes through the `axolotl` command, in a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import ROOT

COMMANDS = [
    [sys.executable, "examples/tiny_assets.py", "outputs/tiny-base"],
    ["axolotl", "train", "recipes/tiny-sft.yaml"],
    ["axolotl", "train", "recipes/tiny-dpo.yaml"],
]
SHOW = [sys.executable, "examples/demo.py", "outputs/tiny-base", "outputs/tiny-sft", "outputs/tiny-dpo"]
WARM = ("happy to help", "good question", "of course", "certainly", "thanks for asking")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    for name in ("recipes", "examples"):
        (folder / name).symlink_to(ROOT / name)
    for command in COMMANDS:
        done = run(command, folder)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=dict(os.environ), capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_demo_keeps_its_promises(demo: Path):
    shown = run(SHOW, demo)
    assert shown.returncode == 0, shown.stdout + shown.stderr[-2000:]
    assert "NO " not in shown.stdout


@pytest.mark.slow
def test_the_policy_carries_the_preferred_manner_and_the_reference_does_not(demo: Path):
    sys.path.insert(0, str(ROOT / "examples"))
    import demo as show

    base, questions = demo / "outputs/tiny-base", show.QUESTIONS
    policy = show.answers(base, demo / "outputs/tiny-dpo", questions)
    reference = show.answers(base, demo / "outputs/tiny-sft", questions)
    assert all(answer.lower().startswith(WARM) for answer in policy), policy
    assert not any(answer.lower().startswith(WARM) for answer in reference), reference
