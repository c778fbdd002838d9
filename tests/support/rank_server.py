"""Ranks forked from one process that has imported everything: half a minute of imports less for every run.

They do what torchrun's do; tests/ranks/test_launchers.py holds that real launchers print the same curve.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

IMPORTED = ["axolotl.cli.train", "axolotl.train", "deepspeed", "dpo_plugin.host.trainer", "tests.support.cpu_ranks"]
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(IMPORTED)


def run_ranks(file: Path, ranks: int, port: int, environment: dict[str, str], timeout: float) -> tuple[int, str]:
    """Run `axolotl train file` in so many ranks. When one fails, or time is up, the others are killed.

    Returns:
        Code of the first that failed, else 0; 124 when time was up. And what all of them wrote.
    """
    with mock.patch.dict(os.environ, {**environment, "DS_ACCELERATOR": "cpu"}, clear=True):
        forkserver.ensure_running()
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    with tempfile.NamedTemporaryFile() as log:
        processes = []
        for rank in map(str, range(ranks)):
            own = {**environment, **world, "LOCAL_WORLD_SIZE": str(ranks), "RANK": rank, "LOCAL_RANK": rank}
            processes.append(FORKED.Process(target=train, args=(file, own, log.name)))
            processes[-1].start()
        code = wait(processes, time.monotonic() + timeout)
        return code, Path(log.name).read_text(errors="replace")


def wait(processes: list[multiprocessing.process.BaseProcess], end: float) -> int:
    left = list(processes)
    while left and connection.wait([one.sentinel for one in left], timeout=max(0, end - time.monotonic())):
        left = [one for one in left if one.is_alive()]
        if any(one.exitcode for one in processes):
            break
    failed = [one.exitcode for one in processes if one.exitcode]
    for one in left:
        one.kill()
        one.join()
    return failed[0] if failed else 124 if left else 0


def train(file: Path, environment: dict[str, str], log: str) -> None:
    """Body of a rank; it ends as the program does."""
    multiprocessing.set_start_method(None, force=True)  # the platform's, as for a process that nobody forked
    os.environ.update(environment)
    sys.argv = ["axolotl.cli.train", str(file)]
    with Path(log).open("ab", buffering=0) as written:
        os.dup2(written.fileno(), sys.stdout.fileno())
        os.dup2(written.fileno(), sys.stderr.fileno())
    from axolotl.cli.train import do_cli

    try:
        do_cli(str(file))
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
