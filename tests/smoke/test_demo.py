"""The demo's commands and recipes, on a base that has hardly been trained; `make demo`, which CI runs, trains it well."""

import sys

import pytest

from tests.support import forked
from tests.support.tiny import ROOT

COMMANDS = [
    [sys.executable, "examples/tiny_assets.py", "outputs/tiny-base", "--steps", "20"],
    ["axolotl", "train", "recipes/tiny-sft.yaml", "--launcher", "python"],
    ["axolotl", "train", "recipes/tiny-dpo.yaml", "--launcher", "python"],
]
SHOW = [sys.executable, "examples/demo.py", "outputs/tiny-base", "outputs/tiny-sft", "outputs/tiny-dpo"]


@pytest.mark.slow
def test_the_demo_ends_with_its_promises_and_says_which_are_not_kept(tmp_path):
    for name in ("recipes", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in COMMANDS:
        done = forked.run(command, tmp_path)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    shown = forked.run(SHOW, tmp_path)
    lines = shown.stdout.splitlines()
    promises = [line for line in lines if line.startswith(("yes  ", "NO   "))]
    assert len(promises) == 5, shown.stdout + shown.stderr[-2000:]
    assert {"yes  first loss is ln 2", "yes  first margin is 0", "yes  the reference is not"} <= {*promises}
    assert shown.returncode == any(line.startswith("NO") for line in promises)
    assert (tmp_path / "outputs/tiny-dpo/report.html").is_file()
