"""The log, under the host's configuration, and what does not belong in it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from axolotl.utils.logging import get_logger

LOG = get_logger("axolotl.dpo_plugin")


def ignore_deprecated_collectives() -> None:
    """Leave out torch 2.13's FutureWarnings of `all_gather_into_tensor` and `reduce_scatter_tensor`.

    DeepSpeed 0.19 and FSDP2 call them, so they come with every gather, and nobody who trains can change that.
    tests/ranks/test_ranks.py counts them in the output of two ranks.
    """
    deprecated = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", deprecated, FutureWarning)


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
