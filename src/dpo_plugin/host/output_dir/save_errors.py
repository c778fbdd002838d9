"""Turns a save that fails into an error that says what failed, where, and what to write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dpo_plugin.errors import CheckpointError

_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "iostream error")
"""What the RuntimeError says that `torch.save` makes of a full disk."""


@contextmanager
def saving(folder: Path, step: int | None = None) -> Iterator[None]:
    """Context in which files are written into a folder.

    Args:
        folder: Where.
        step: The step at which it is, if that is known.

    Raises:
        CheckpointError: If the disk is full or refuses the files.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _TORCH_SAVE):
            raise
        when = "" if step is None else f" at step {step}"
        raise CheckpointError(
            f"{folder} cannot be written{when}: {' '.join(str(error).split())[:200]}. Earlier checkpoints are whole. "
            "Make room, then write: auto_resume_from_checkpoints: true (or output_dir: <a folder with room>)"
        ) from error
