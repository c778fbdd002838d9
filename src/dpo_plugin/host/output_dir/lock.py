"""One run per output folder: a file in it names the process that trains there."""

from __future__ import annotations

import atexit
import json
import os
import socket
from pathlib import Path
from typing import Any

import psutil

from dpo_plugin.errors import ConfigError

LOCK = ".dpo_plugin.lock"


def hold(output_dir: Path) -> None:
    """Take the folder for this run until its main process ends; ranks of one run share what rank 0 has taken.

    The lock of a process that is no longer there is taken over. That can be seen on its own host alone.

    Raises:
        ConfigError: If another run that may be alive has it, or it cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    file = output_dir / LOCK
    while not _create(file):
        holder = _read(file)
        if holder and holder != _ours() and _may_live(holder):
            raise ConfigError(
                f"`output_dir: {output_dir}` is in use by the run of process {holder['pid']} on {holder['host']}, and "
                f"two runs would overwrite each other's checkpoints. If that run is dead, delete {file}. "
                "Write: output_dir: <another folder>"
            )
        file.unlink(missing_ok=True)
    atexit.register(release, output_dir)


def release(output_dir: Path) -> None:
    """Release the folder if this process holds it."""
    file = output_dir / LOCK
    if _read(file) == _ours():
        file.unlink(missing_ok=True)


def _ours() -> dict[str, Any]:
    """What a lock of this process says; with the time of its start, because process ids are used again."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": psutil.Process().create_time()}


def _create(file: Path) -> bool:
    """Write the lock unless one exists; says whether it did."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as lock:
            lock.write(json.dumps(_ours()))
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(
            f"`output_dir: {file.parent}` cannot be written: {error}. Write: output_dir: <a folder>"
        ) from error
    return True


def _read(file: Path) -> dict[str, Any] | None:
    """Read who holds the lock; None if the lock is incomplete."""
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
        return {"pid": int(holder["pid"]), "host": str(holder["host"]), "started": float(holder["started"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _may_live(holder: dict[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return True
    try:
        return bool(abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < 1)  # seconds
    except psutil.NoSuchProcess:
        return False
