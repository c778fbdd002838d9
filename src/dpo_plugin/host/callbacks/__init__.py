"""Callbacks of a run, and the part of the trainer that they may use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from dpo_plugin.compute.batching import PairCollator
    from dpo_plugin.compute.step import PreferenceStep
    from dpo_plugin.host.output_dir.checkpoints import Origin
    from dpo_plugin.host.settings import RunSettings
    from dpo_plugin.metrics.recorder import MetricRecorder
    from dpo_plugin.model.buffers import ComputedBuffers
    from dpo_plugin.model.cache import CachedReference


class RunningTrainer(Protocol):
    """The part of `PreferenceTrainer` that callbacks and commands use.

    Attributes:
        settings: The run's settings.
        reference: The reference behind its cache.
        preference_step: From a batch to the loss.
        recorder: What is added to a log line.
        computed_buffers: Of policy and second model.
        origin: What the run trains with.
        cache_reference: Computes and caches the reference's log-probs of a collated micro-batch.

    The others are those of transformers' trainer.
    """

    settings: RunSettings
    reference: CachedReference
    preference_step: PreferenceStep
    recorder: MetricRecorder
    computed_buffers: Sequence[ComputedBuffers]
    origin: Origin
    args: Any
    state: Any
    accelerator: Any
    model: Any
    train_dataset: Any
    eval_dataset: Any
    data_collator: PairCollator
    processing_class: Any
    callback_handler: Any
    is_fsdp_enabled: bool
    is_world_process_zero: Callable[[], bool]
    cache_reference: Callable[[dict[str, Any]], None]
    get_train_dataloader: Callable[[], Any]
    get_eval_dataloader: Callable[[Any], Any]
