"""What the trainer saves so that a run can be gone on with, and how it goes on."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers.trainer_utils import rotate_checkpoints

from dpo_plugin.host.output_dir.checkpoints import Origin, checkpoint_to_resume, file_digests, write_marker
from dpo_plugin.host.output_dir.saving import saving
from dpo_plugin.model.adapters import POLICY, PolicyReferenceModel, adapter_facts, adapter_tensors

REFERENCE_STATE = "reference_state.safetensors"


class ResumesWhole:
    """Mixin for the trainer; a checkpoint says what it was trained with, and last of all that it is whole."""

    accelerator: Any
    args: Any
    control: Any
    model: Any
    reference: Any
    state: Any
    _base: str
    _settings: Any

    @cached_property
    def origin(self) -> Origin:
        """What this run trains with; to be asked for before an engine has the model."""
        reference = {"strategy": self._settings.reference.name, "identity": self.reference.strategy.identity()}
        if not isinstance(self.model, PolicyReferenceModel):
            return Origin(reference, self._base)
        config = self.model.peft_config[POLICY].to_dict()
        return Origin(reference, self._base, adapter_facts(config, adapter_tensors(self.model, POLICY)))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, or resume from a whole checkpoint that was made with the same base, reference and settings.

        Raises:
            CheckpointError: If the checkpoint is torn, damaged, not ours, or was made with something else.
        """
        resume = checkpoint_to_resume(
            resume_from_checkpoint,
            self._settings.resume_named,
            Path(self.args.output_dir),
            self.origin,
            self.accelerator.is_local_main_process,
        )
        return super().train(resume_from_checkpoint=resume, **kwargs)  # type: ignore[misc]

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        """Give a reference that moves the values that the checkpoint has, on any engine."""
        prepared: tuple[Any, Any] = super()._prepare_for_training(  # type: ignore[misc]
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if resume_from_checkpoint is not None and self.reference.strategy.state():
            self.reference.strategy.load_state(load_file(Path(resume_from_checkpoint) / REFERENCE_STATE))
        return prepared

    def _run_epoch(self, **kwargs: Any) -> None:
        """Train an epoch, unless the run is at its last step already: transformers 5.16 would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy, and beside it what it was trained with.

        Raises:
            CheckpointError: If it cannot be written.
        """
        folder = Path(output_dir or self.args.output_dir)
        with saving(folder, self.state.global_step):
            super().save_model(output_dir, _internal_call=_internal_call)  # type: ignore[misc]
            if not self.args.should_save:
                return
            write_marker(folder, self.origin)
            if _internal_call and (state := self.reference.strategy.state()):
                save_file(state, folder / REFERENCE_STATE)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, last of all the digests of its files; older ones go only then.

        Raises:
            CheckpointError: If it cannot be written.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with saving(Path(self.args.output_dir), self.state.global_step):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
            write_marker(folder, self.origin, file_digests(folder))
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)
