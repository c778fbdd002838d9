"""What is saved along with the policy so that a run can be resumed, and loaded again when it is; saves that fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import rotate_checkpoints

from dpo_plugin.errors import CheckpointError
from dpo_plugin.host.output_dir.checkpoints import Origin, file_digests, write_marker
from dpo_plugin.model.adapter_config import adapter_facts
from dpo_plugin.model.adapters import POLICY, PolicyReferenceModel, adapter_tensors
from dpo_plugin.model.references import ReferenceStrategy

REFERENCE_STATE = "reference_state.safetensors"


def origin_of(
    model: Any, strategy_name: str, strategy: ReferenceStrategy, base: str, master_weights: bool | None = None
) -> Origin:
    """Say what a run trains with, on the base model of a digest; call before an engine takes over the model."""
    reference = {"strategy": strategy_name, "identity": strategy.identity()}
    if not isinstance(model, PolicyReferenceModel):
        return Origin(reference, base, master_weights=master_weights)
    config = model.peft_config[POLICY].to_dict()
    return Origin(reference, base, adapter_facts(config, adapter_tensors(model, POLICY)))


def save_reference(strategy: ReferenceStrategy, folder: Path) -> None:
    """Save a reference that moves."""
    if state := strategy.state():
        save_file(state, folder / REFERENCE_STATE)


def load_reference(strategy: ReferenceStrategy, folder: Path) -> None:
    """Restore a reference that moves from a checkpoint."""
    if strategy.state():
        strategy.load_state(load_file(folder / REFERENCE_STATE))


def complete_checkpoint(folder: Path, origin: Origin, limit: int | None, best: str | None) -> None:
    """Mark a checkpoint as complete, then delete the oldest beyond `limit` (None keeps all), but never `best`."""
    write_marker(folder, origin, file_digests(folder))
    rotate_checkpoints(str(folder.parent), limit, best, use_mtime=True)


_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "iostream error")
"""What the RuntimeError says that `torch.save` makes of a full disk."""


@contextmanager
def saving(folder: Path, step: int | None = None) -> Iterator[None]:
    """Context in which files are written into a folder, at a step if that is known.

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
