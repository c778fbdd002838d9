"""The errors a user can meet, which say what was found, where, and what to write; and how they end a process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from types import TracebackType


class DPOPluginError(Exception):
    """Anything that dpo_plugin refuses to go on with."""


class ConfigError(DPOPluginError):
    """The YAML asks for something that does not exist, contradicts itself, or is not supported."""


class RegistrationError(DPOPluginError):
    """A third party's hook cannot be used: it does not import, is misspelled, or takes a name twice."""


class UnknownNameError(ConfigError):
    """The YAML names a format, strategy, loss or metric that nobody registered."""


class AdapterError(DPOPluginError):
    """An adapter cannot be read, does not fit the base model, or was not attached as it is on disk."""


class DataError(DPOPluginError):
    """The preference data cannot be read, or nothing usable is left of it."""


class RowError(DPOPluginError):
    """One row of the preference data cannot be used; the row is counted, not repaired.

    Attributes:
        reason: Under what the audit counts the row.
    """

    def __init__(self, message: str, reason: str = "malformed"):
        super().__init__(message)
        self.reason = reason


class TemplateError(DPOPluginError):
    """The chat template cannot say which tokens of a conversation are the completion."""


class CheckpointError(DPOPluginError):
    """A checkpoint is incomplete, not ours, or was made with another reference."""


class ReferenceMismatchError(DPOPluginError):
    """Policy and reference should be equal at step 0 and are not."""


class NotFiniteError(DPOPluginError):
    """A log-probability is NaN or infinite; names step, row and source."""


class ScorerError(DPOPluginError):
    """A scorer raised, took too long, or gave something else than one finite number per answer."""


class RankMismatchError(DPOPluginError):
    """The processes of a distributed run are about to do different things."""


class HealthError(DPOPluginError):
    """A health check whose action is ``stop`` has found something."""


# ── the end of a process ──


@cache
def report_errors() -> None:
    """Let an error of ours end the process as one line, without a traceback, said by one rank of a node.

    Takes over `sys.excepthook`, once per process, unless the environment has ``DPO_PLUGIN_TRACEBACK``.
    """
    previous = sys.excepthook
    if os.environ.get("DPO_PLUGIN_TRACEBACK"):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, DPOPluginError):
            _say(f"dpo_plugin: {error}")
        else:
            previous(kind, error, traceback)

    sys.excepthook = hook


def _say(text: str) -> None:
    sys.stdout.flush()
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # of torchrun and accelerate, which end with what is in it
    first = int(os.environ.get("WORLD_SIZE") or 1) == 1 or _is_first(text, error_file)
    if error_file:
        with contextlib.suppress(OSError):
            Path(error_file).write_text(json.dumps(_record(text, first)), encoding="utf-8")
            return
    if first:
        print(text, file=sys.stderr, flush=True)


def _is_first(text: str, error_file: str | None) -> bool:
    """Whether no other rank of this node has said it."""
    folder = Path(error_file).parents[1] if error_file else Path(tempfile.gettempdir())
    mark = folder / f"dpo_plugin-{os.getppid()}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    try:
        if mark.exists() and time.time() - mark.stat().st_mtime > 60:  # seconds
            mark.unlink()  # of an earlier run whose launcher had the same process id
        mark.touch(exist_ok=False)
    except OSError as error:
        return not isinstance(error, FileExistsError)
    return True


def _record(text: str, first: bool) -> dict[str, object]:
    """The error file in the form of torch.distributed.elastic, whose root cause is the record with the least time."""
    if first:
        return {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
    return {"message": "as on another rank", "timestamp": int(time.time()) + 1}
