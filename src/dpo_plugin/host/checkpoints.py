"""Which checkpoint a run may resume from: a whole one, made with the same reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

import dpo_plugin
from dpo_plugin.errors import CheckpointError
from dpo_plugin.host.log import LOG

MARKER = "dpo_plugin.json"


def write_marker(folder: Path, reference: Mapping[str, str]) -> None:
    """Say in a saved folder which reference it was trained against.

    Args:
        folder: A checkpoint or the output folder.
        reference: ``strategy`` and ``identity`` (a digest).
    """
    content = {"dpo_plugin": dpo_plugin.__version__, "reference": dict(reference)}
    (folder / MARKER).write_text(json.dumps(content, indent=2), encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint was written to its end; the trainer writes its state last."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    adapter = folder / "adapter_model.safetensors"
    return not adapter.exists() or is_readable(adapter)


def is_readable(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with safe_open(file, framework="pt") as handle:
            return bool(list(handle.keys()))
    except (SafetensorError, OSError):
        return False


def checkpoint_to_resume(asked: str | bool | None, named_by_user: bool, output_dir: Path) -> str | None:
    """The checkpoint that a run resumes from.

    Args:
        asked: What the host passes to ``Trainer.train``.
        named_by_user: Whether the YAML names it; otherwise it is the newest, which a killed run may have left torn.
        output_dir: Where checkpoints are.

    Raises:
        CheckpointError: If the named one is torn.
    """
    if not asked:
        return None
    if named_by_user and isinstance(asked, str):
        if not is_whole(Path(asked)):
            raise CheckpointError(
                f"`resume_from_checkpoint: {asked}` was not written to its end. Write: resume_from_checkpoint: <an "
                "earlier one>"
            )
        return asked
    folders = [folder for folder in output_dir.glob("checkpoint-*") if folder.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda folder: int(folder.name.split("-")[-1]), reverse=True):
        if is_whole(folder):
            return str(folder)
        LOG.warning(f"dpo_plugin: {folder} was not written to its end and is passed over")
    return None


def check_reference(folder: Path, reference: Mapping[str, str]) -> None:
    """Refuse a checkpoint that was trained against another reference, or does not say against which.

    Raises:
        CheckpointError: Naming both digests.
    """
    marker = folder / MARKER
    if not marker.is_file():
        raise CheckpointError(
            f"the checkpoint {folder} does not say which reference it was trained against, so it is not dpo_plugin's. "
            f"To start a new run from its adapter, write: lora_model_dir: {folder}"
        )
    made_with: Any = json.loads(marker.read_text(encoding="utf-8"))["reference"]
    if made_with != dict(reference):
        raise CheckpointError(
            f"the checkpoint {folder} was trained against the reference {_named(made_with)}, and this run has "
            f"{_named(reference)}. Rewards of the two are not comparable. Put back the old reference, or start anew: "
            "auto_resume_from_checkpoints: false"
        )


def _named(reference: Mapping[str, str]) -> str:
    return f"{reference['strategy']} {reference['identity']}"
