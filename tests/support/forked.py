"""Python processes forked from one that has imported everything: ten seconds of imports less for each.

A command is run as Python would run it. tests/ranks/test_launchers.py and the demo hold that real processes do the same.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
IMPORTED = [
    *("axolotl.cli.main", "axolotl.cli.train", "axolotl.train", "deepspeed"),
    *("dpo_plugin.host.trainer", "dpo_plugin.host.commands.cli", "tests.support.cpu_ranks", "tests.support.frozen"),
]
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(IMPORTED)


@dataclass
class Forked:
    """A process that was started, and the files it writes to."""

    command: list[str]
    process: multiprocessing.process.BaseProcess
    folder: tempfile.TemporaryDirectory[str]

    def end(self, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """Wait for it, as `subprocess.run` with ``text=True`` and ``capture_output=True``; past the time it is killed.

        Raises:
            subprocess.TimeoutExpired: If it was.
        """
        self.process.join(timeout)
        if self.process.is_alive():
            self.kill()
            raise subprocess.TimeoutExpired(self.command, timeout or 0)
        said = [(Path(self.folder.name) / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        self.folder.cleanup()
        assert self.process.exitcode is not None
        return subprocess.CompletedProcess(self.command, self.process.exitcode, *said)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def start(
    command: list[str], cwd: Path = ROOT, env: dict[str, str] | None = None, stdin: str = "", together: bool = False
) -> Forked:
    """Start a command that begins with `sys.executable` or the name of a script of this environment.

    Args:
        command: The command.
        cwd: Its current folder.
        env: Its environment; None for a copy of this one.
        stdin: What it reads.
        together: Whether stdout and stderr are one file.
    """
    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / "stdin").write_text(stdin)
    for name in ("stdout", "stderr"):
        (Path(folder.name) / name).touch()
    environment = dict(os.environ) if env is None else env
    with mock.patch.dict(os.environ, {**environment, "DS_ACCELERATOR": "cpu"}, clear=True):
        forkserver.ensure_running()
    streams = [Path(folder.name) / name for name in ("stdin", "stdout", "stdout" if together else "stderr")]
    process = FORKED.Process(target=become, args=(command, str(cwd), environment, streams))
    process.start()
    return Forked(command, process, folder)


def run(command: list[str], cwd: Path = ROOT, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Start a command and wait for its end."""
    return start(command, cwd, stdin=stdin).end()


def run_ranks(file: Path, ranks: int, port: int, environment: dict[str, str], timeout: float) -> tuple[int, str]:
    """Run `axolotl train file` in so many ranks. When one fails, or time is up, the others are killed.

    Returns:
        Code of the first that failed, else 0; 124 when time was up. And what all of them wrote.
    """
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", "axolotl.cli.train", str(file)]
    started = []
    for rank in map(str, range(ranks)):
        own = {**environment, **world, "LOCAL_WORLD_SIZE": str(ranks), "RANK": rank, "LOCAL_RANK": rank}
        started.append(start(command, env=own, together=True))
    code = wait([one.process for one in started], time.monotonic() + timeout)
    return code, "".join(one.end().stdout for one in started)


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


def become(command: list[str], cwd: str, environment: dict[str, str], streams: list[Path]) -> None:
    """Body of a process; it ends as the program does."""
    multiprocessing.set_start_method(None, force=True)  # the platform's, as for a process that nobody forked
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, (file, flags) in enumerate(zip(streams, (os.O_RDONLY, *[os.O_WRONLY | os.O_APPEND] * 2), strict=True)):
        os.dup2(os.open(file, flags), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the one that multiprocessing gives reads nothing
    program, *words = command
    if program != sys.executable:
        words = [str(Path(sys.executable).with_name(program)), *words]
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
