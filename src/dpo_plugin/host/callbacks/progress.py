"""What a person sees: what is trained, bars with pairs per second and time left, and one short line per log step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback

from dpo_plugin.host.log import LOG
from dpo_plugin.metrics.log_line import duration, summary
from dpo_plugin.model.adapters import PolicyReferenceModel


class Progress(ProgressCallback):  # type: ignore[misc]
    """Replaces the host's bar, which prints every field of every line.

    Bars are drawn on a terminal alone; the short lines are printed in any case, and without bars they say how long the
    run has taken and will take. All fields are in dpo_log.jsonl, the report and the trackers.

    Args:
        bars: Whether bars are wanted at all; the host's ``disable_tqdm``.
        clock: Seconds since some moment.
    """

    def __init__(self, bars: bool = True, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._clock = clock
        self._started, self._first = clock(), 0
        self.training_bar: Any
        self.prediction_bar: Any
        self._disable = None if bars else True  # None: where the output is no terminal
        self._bar = partial(tqdm, dynamic_ncols=True, disable=self._disable)

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        """Log how much there is to do, and draw the bar of the run."""
        self._started, self._first = self._clock(), state.global_step
        if state.is_world_process_zero:
            LOG.info(f"dpo_plugin: {_amount(args, state, train_dataloader)}")
            self.training_bar = self._bar(total=state.max_steps, desc="DPO", unit="step")
        self.current_step = 0

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Draw the bar of an evaluation, in pairs."""
        if not state.is_world_process_zero or eval_dataloader is None:
            return
        if self.prediction_bar is None:
            pairs, leave = len(eval_dataloader.dataset), self.training_bar is None
            self.prediction_bar = self._bar(total=pairs, desc="Held-out pairs", unit="pair", leave=leave)
        bar = self.prediction_bar
        bar.update(min(args.eval_batch_size * args.world_size, bar.total - bar.n))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Print the short line."""
        if not state.is_world_process_zero:
            return
        if self.training_bar is not None and (pace := logs.get("speed/pairs_per_second")):
            self.training_bar.set_postfix_str(f"{pace:.3g} pairs/s", refresh=False)
        if text := summary(logs, state.global_step, state.max_steps, self._time(state)):
            tqdm.write(text)

    def _time(self, state: Any) -> str:
        """Format the time gone and, at the pace so far, left; empty if a bar shows it."""
        done = state.global_step - self._first
        if done <= 0 or (self._disable is None and sys.stderr.isatty()):
            return ""
        gone = self._clock() - self._started
        return f"{duration(gone)}, {duration(gone / done * (state.max_steps - state.global_step))} left"


def _amount(args: Any, state: Any, loader: Any) -> str:
    """Describe the pairs, pairs per step and steps of a run."""
    micro, accumulation, ranks = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    factors = {"micro_batch_size": micro, "accumulated": accumulation, "processes": ranks}
    made = " × ".join(
        f"{number} {name}" for name, number in factors.items() if number > 1 or name == "micro_batch_size"
    )
    pairs = f"{len(loader.dataset):,} pairs; " if loader is not None else ""
    resumed = f", from step {state.global_step}" if state.global_step else ""
    return f"{pairs}{micro * accumulation * ranks} pairs a step ({made}); {state.max_steps} steps{resumed}"


def log_setup(trainer: Any) -> None:
    """Log what a `PreferenceTrainer` trains, against which reference, and what it found in the cache."""
    settings = trainer.settings
    fresh = "a fresh LoRA" if isinstance(trainer.model, PolicyReferenceModel) else "the base model"
    start = settings.policy.path if settings.policy else fresh
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    losses = ", ".join(trainer.preference_step.losses)
    LOG.info(
        f"dpo_plugin: policy starts from {start}, {trainable:,} trainable parameters; "
        f"reference: {settings.reference}; loss: {losses}, beta {trainer.args.beta}"
    )
    if trainer.ref_model is not None:
        size = sum(p.numel() * p.element_size() for p in trainer.ref_model.parameters()) / 2**30
        LOG.info(f"dpo_plugin: the second model that is the reference takes {size:.2f} GiB")
    if (cache := trainer.reference.cache) is not None:
        damaged = f", {cache.damaged} damaged records left out" if cache.damaged else ""
        LOG.info(f"dpo_plugin: {len(cache)} reference log-probs found in {cache.folder}{damaged}")
