"""The log, under the host's configuration; only the main process writes to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from axolotl.utils.logging import get_logger

LOG = get_logger("axolotl.dpo_plugin")

_UNWRITTEN: set[Path] = set()


@contextmanager
def may_fail(file: Path) -> Iterator[None]:
    """Let a run go on where a file that only tells of it cannot be written; said once per file."""
    try:
        yield
    except OSError as error:
        if file not in _UNWRITTEN:
            _UNWRITTEN.add(file)
            LOG.warning(f"dpo_plugin: training goes on, but {file} cannot be written: {error}")
