"""An error of ours that ends a process is one line, without a traceback, and said by one rank of a node."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from dpo_plugin.errors import DPOPluginError

TRACEBACK = "DPO_PLUGIN_TRACEBACK"
"""Environment variable that brings the traceback back."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Set by torchrun and accelerate for each rank; what is in the file ends the launcher's own message."""

STALE = 60
"""Seconds after which another run, whose launcher happens to have the same process id, may say the same again."""


def install() -> None:
    """Take over `sys.excepthook` for our errors; once per process."""
    previous = sys.excepthook
    if os.environ.get(TRACEBACK) or getattr(previous, "is_ours", False):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, DPOPluginError):
            _say(f"dpo_plugin: {error}")
        else:
            previous(kind, error, traceback)

    hook.is_ours = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _say(text: str) -> None:
    sys.stdout.flush()
    error_file = os.environ.get(ERROR_FILE)
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
        if mark.exists() and time.time() - mark.stat().st_mtime > STALE:
            mark.unlink()
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _record(text: str, first: bool) -> dict[str, object]:
    """The error file in the form of torch.distributed.elastic, whose root cause is the record with the least time."""
    if first:
        return {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
    return {"message": "as on another rank", "timestamp": int(time.time()) + 1}
