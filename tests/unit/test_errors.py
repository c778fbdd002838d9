"""An error of ours is the last line of a process, once, on one and on several ranks; others keep their traceback."""

import json
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

RAISE = """
from dpo_plugin.errors import ConfigError, report_errors
report_errors()
report_errors()
print("a log line")
try:
    {}["rl_beta"]
except KeyError as error:
    raise ERROR from error
"""
SAYS = "dpo_plugin: `rl_beta: 0` must be above 0. Write: rl_beta: 0.1"


def run(error='ConfigError("`rl_beta: 0` must be above 0. Write: rl_beta: 0.1")', **environment):
    made = subprocess.run(
        [sys.executable, "-c", RAISE.replace("ERROR", error)],
        env={"PYTHONPATH": ":".join(sys.path), **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 1
    return made.stderr


def test_one_process():
    assert run() == f"{SAYS}\n"


def test_a_traceback_where_it_is_wanted_and_of_other_errors():
    assert run(DPO_PLUGIN_TRACEBACK="1").count("Traceback") == 2
    others = run("RuntimeError('theirs')")
    assert others.count("Traceback") == 2
    assert others.endswith("RuntimeError: theirs\n")


@pytest.mark.parametrize("same", [True, False])
def test_ranks_without_error_files(tmp_path, same):
    """As DeepSpeed's launcher starts them: each rank has another message, or one says the one of all."""
    errors = [f'ConfigError("rank {0 if same else rank}")' for rank in range(3)]
    said = [run(error, WORLD_SIZE="3", RANK=str(rank), TMPDIR=str(tmp_path)) for rank, error in enumerate(errors)]
    expected = ["rank 0", None, None] if same else ["rank 0", "rank 1", "rank 2"]
    assert said == [f"dpo_plugin: {text}\n" if text else "" for text in expected]


def test_ranks_under_torchrun_end_its_message(tmp_path):
    """The launcher's own message, made by torch from the files that ranks leave, names ours once, as the root cause."""
    files = [tmp_path / str(rank) / "error.json" for rank in range(2)]
    for rank, file in reversed(list(enumerate(files))):
        file.parent.mkdir()
        assert run(WORLD_SIZE="2", RANK=str(rank), TORCHELASTIC_ERROR_FILE=str(file)) == ""
    failures = {rank: ProcessFailure(rank, 100 + rank, 1, str(file)) for rank, file in enumerate(files)}
    lines = str(ChildFailedError("axolotl.cli.train", failures)).splitlines()
    assert lines[-2] == f"  traceback : {SAYS}"
    assert set(lines[-1]) == {"="}
    assert sum(SAYS in line for line in lines) == 1
    assert json.loads(files[0].read_text())["message"] == "as on another rank"
