"""What the reference and the ranks need from the training loop."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from dpo_plugin.engines.ranks import check_ranks_agree, facts_of
from dpo_plugin.host.log import LOG


class ReferenceCallback(TrainerCallback):  # type: ignore[misc]
    """Fills, flushes and re-reads the cache of reference log-probs, and moves a reference that moves.

    Args:
        trainer: The `PreferenceTrainer`.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._told = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See that ranks agree; with ``precompute_ref_log_probs``, run the reference over all rows not kept yet."""
        check_ranks_agree(facts_of(self.trainer))
        for kept in self.trainer._computed_buffers:
            kept.restore()
            kept.check()
        self.trainer.adapter_norms()
        self.trainer.remember_start(state.log_history)
        if not args.precompute_ref_log_probs or self.trainer.reference.cache is None:
            return
        evaluation = self.trainer.eval_dataset
        sets = [self.trainer.train_dataset, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]
        training = self.trainer.model.training
        self.trainer.model.eval()
        for data in sets:
            if data is not None:
                self._fill(data)
        self.trainer.model.train(training)
        self._share()

    def _fill(self, data: Any) -> None:
        trainer = self.trainer
        loader = trainer.get_eval_dataloader(data)
        bar = tqdm(
            loader,
            desc="Reference log-probs",
            unit="batch",
            disable=True if not trainer.accelerator.is_main_process else None,
        )
        for inputs in bar:
            trainer.reference_logps(trainer.model_wrapped, trainer._prepare_inputs(inputs))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take over what other ranks have computed in the epoch before."""
        if self.trainer.accelerator.num_processes > 1 and state.epoch:
            self._share()

    def _share(self) -> None:
        cache = self.trainer.reference.cache
        if cache is not None:
            self._flush()
            if self.trainer.accelerator.num_processes > 1:
                self.trainer.accelerator.wait_for_everyone()
                cache.reload()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the reference move."""
        self.trainer.reference.strategy.after_step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write what is new."""
        self._flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write what is new."""
        self._flush()

    def _flush(self) -> None:
        cache = self.trainer.reference.cache
        if cache is None:
            return
        cache.flush()
        if cache.failure and not self._told:
            self._told = True
            LOG.warning(f"dpo_plugin: training goes on, but reference log-probs are not kept on disk: {cache.failure}")
