"""Callbacks of a run, and the part of the trainer that they may use."""

from __future__ import annotations

from collections.abc import Sequence

from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

from dpo_plugin.compute.batching import PairCollator
from dpo_plugin.compute.step import PreferenceStep
from dpo_plugin.host.output_dir.checkpoints import Origin
from dpo_plugin.host.settings import RunSettings
from dpo_plugin.metrics.recorder import MetricRecorder
from dpo_plugin.model.buffers import ComputedBuffers
from dpo_plugin.model.cached_reference import CachedReference


class RunningTrainer(AxolotlDPOTrainer):  # type: ignore[misc]
    """What callbacks and commands may use of `PreferenceTrainer`, besides what it has of the host's.

    Attributes:
        settings: The run's settings.
        reference: The reference behind its cache.
        preference_step: From a batch to the loss.
        recorder: What is added to a log line.
        computed_buffers: Of policy and second model.
        origin: What the run trains with.
        beta: β.
    """

    settings: RunSettings
    reference: CachedReference
    preference_step: PreferenceStep
    recorder: MetricRecorder
    computed_buffers: Sequence[ComputedBuffers]
    origin: Origin
    beta: float
    data_collator: PairCollator
