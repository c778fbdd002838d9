"""Cache and movement of the reference in the training loop, and whether ranks agree."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from dpo_plugin.engines.ranks import check_ranks_agree
from dpo_plugin.host.batches import decide_layout, named_datasets
from dpo_plugin.host.callbacks import RunningTrainer
from dpo_plugin.host.log import LOG


class ReferenceCallback(TrainerCallback):  # type: ignore[misc]
    """Fills, flushes and re-reads the cache of reference log-probs, and moves a reference that moves."""

    def __init__(self, trainer: RunningTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check that ranks agree; with ``precompute_ref_log_probs``, run the reference over all rows not cached yet."""
        trainer = self.trainer
        check_ranks_agree(_facts(trainer))
        for buffers in trainer.computed_buffers:
            buffers.restore()
            buffers.check()
        decide_layout(trainer)
        trainer.recorder.adapter_norms(trainer.model)
        trainer.recorder.remember_start(state.log_history)
        if not args.precompute_ref_log_probs or trainer.reference.cache is None:
            return
        training = trainer.model.training
        trainer.model.eval()
        silent = None if trainer.accelerator.is_main_process else True  # None: where the output is no terminal
        for _name, data in named_datasets(trainer):
            loader = trainer.get_eval_dataloader(data)
            for inputs in tqdm(loader, desc="Reference log-probs", unit="batch", disable=silent):
                trainer.cache_reference(inputs)
        trainer.model.train(training)
        self._share()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Load what other ranks computed in the epoch before."""
        if state.epoch:
            self._share()

    def _share(self) -> None:
        self._flush()
        cache, accelerator = self.trainer.reference.cache, self.trainer.accelerator
        if cache is not None and accelerator.num_processes > 1:
            accelerator.wait_for_everyone()
            cache.reload()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Update a reference that moves."""
        self.trainer.reference.strategy.after_step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write new log-probs to the cache."""
        self._flush()

    on_train_end = on_log

    def _flush(self) -> None:
        cache = self.trainer.reference.cache
        if cache is None:
            return
        cache.flush()
        if cache.failure:
            LOG.warning_once(f"dpo_plugin: training goes on, but no reference log-probs are cached: {cache.failure}")


def _facts(trainer: RunningTrainer) -> dict[str, Any]:
    """Collect what must be equal on every rank before the first step."""
    digests = getattr(trainer.accelerator.unwrap_model(trainer.model), "digests", {})
    weights = trainer.preference_step.weights
    return {
        "dpo_plugin's version": importlib.metadata.version("dpo-plugin"),
        "number of micro-steps per epoch": len(trainer.get_train_dataloader()),
        "adapters": ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(digests.items())) or "none",
        "reference": trainer.reference.strategy.identity(),
        "cached reference log-probs": trainer.reference.cache is not None,
        "layout of batches": repr(trainer.data_collator),
        "loss": ", ".join(f"{name} × {weight:g}" for name, weight in weights.items()),
    }
