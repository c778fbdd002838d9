"""The log, under the host's configuration; only the main process writes to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from axolotl.utils.logging import get_logger

LOG = get_logger("axolotl.dpo_plugin")


@contextmanager
def may_fail(file: Path) -> Iterator[None]:
    """Warn once, and let the run continue, if a file that only reports on it cannot be written."""
    try:
        yield
    except OSError as error:
        LOG.warning_once(f"dpo_plugin: training goes on, but {file} cannot be written: {error}")
