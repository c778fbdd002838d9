"""Our own formats, strategies, losses, metrics, health checks and scorers, registered as a third party would."""

from __future__ import annotations

from collections.abc import Mapping

from dpo_plugin.compute.losses import LOSSES, PreferenceLoss
from dpo_plugin.data.formats import FORMATS, PreferenceFormat
from dpo_plugin.health.checks import CHECKS
from dpo_plugin.health.monitor import HealthCheck
from dpo_plugin.hookspecs import hookimpl
from dpo_plugin.metrics.pair import METRICS, PreferenceMetric
from dpo_plugin.model import references
from dpo_plugin.model.ema import EmaReference
from dpo_plugin.samples.external import CommandScorer, RewardModelScorer
from dpo_plugin.samples.scorers import BatchScorer, Scorer, length, rule


@hookimpl
def dpo_preference_formats() -> Mapping[str, PreferenceFormat]:
    """Our preference formats."""
    return FORMATS


@hookimpl
def dpo_reference_strategies() -> Mapping[str, type[references.ReferenceStrategy]]:
    """Our reference strategies."""
    return {
        "adapter": references.AdapterReference,
        "base": references.BaseReference,
        "model": references.ModelReference,
        "ema": EmaReference,
        "none": references.NoReference,
    }


@hookimpl
def dpo_losses() -> Mapping[str, PreferenceLoss]:
    """TRL's losses under their names."""
    return LOSSES


@hookimpl
def dpo_metrics() -> Mapping[str, PreferenceMetric]:
    """The metrics that users of TRL know, and ours."""
    return METRICS


@hookimpl
def dpo_health_checks() -> Mapping[str, HealthCheck]:
    """Our health checks."""
    return CHECKS


@hookimpl
def dpo_scorers() -> Mapping[str, Scorer | type[BatchScorer]]:
    """Our scorers."""
    return {"rule": rule, "length": length, "command": CommandScorer, "reward_model": RewardModelScorer}
