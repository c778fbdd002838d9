"""The hooks of dpo_plugin: read this file, write one function, add one entry-point line.

Each hook takes nothing and returns a mapping from a name, as it is written in the YAML, to a thing. All are called
once, by `dpo_plugin.registry.get_registry`, before any model is loaded. A name taken twice is an error that names
both owners. Mark implementations with ``dpo_plugin.hookimpl`` and announce the module in ``pyproject.toml``::

    [project.entry-points.dpo_plugin]
    my_plugin = "my_package.my_module"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pluggy import HookimplMarker, HookspecMarker

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_plugin.compute.losses import PreferenceLoss
    from dpo_plugin.data.formats import PreferenceFormat
    from dpo_plugin.health.history import History
    from dpo_plugin.model.references import ReferenceStrategy
    from dpo_plugin.samples.scorers import BatchScorer, Scorer
    from dpo_plugin.types import Finding, PairLogps

hookspec = HookspecMarker("dpo_plugin")
hookimpl = HookimplMarker("dpo_plugin")


@hookspec
def dpo_preference_formats() -> Mapping[str, PreferenceFormat]:  # type: ignore[empty-body]
    """Formats: ``(row, columns) -> PreferencePair``, pure, no tokenizer or I/O; ``type: dpo_plugin.<name>``."""


@hookspec
def dpo_reference_strategies() -> Mapping[str, type[ReferenceStrategy]]:  # type: ignore[empty-body]
    """Reference strategies: give the reference's log-probs, fp32 (pairs,), nats; ``reference.strategy: <name>``.

    A class declares what it is: `moves`, `runs_model`, `needs_lora`, `needs_adapter`, `needs_second_model`. By default
    it is a frozen reference that needs nothing.
    """


@hookspec
def dpo_losses() -> Mapping[str, PreferenceLoss]:  # type: ignore[empty-body]
    """Losses: ``(PairLogps, LossOptions) -> Tensor (pairs,)``; used as ``dpo_loss_type: [<name>]``.

    A function declares what it is with ``@LossTraits(...)`` of `dpo_plugin.compute.loss_traits`. One that does not may
    see a batch's pairs together, so its batches are not split by ``max_tokens``; no option is refused for it.
    """


@hookspec
def dpo_metrics() -> Mapping[str, Callable[[PairLogps], Tensor]]:  # type: ignore[empty-body]
    """Metrics: ``(PairLogps) -> Tensor (pairs,)``, averaged over pairs and ranks, logged under their ``group/name``."""


@hookspec
def dpo_health_checks() -> Mapping[str, Callable[[History], Finding | None]]:  # type: ignore[empty-body]
    """Health checks: ``(History) -> Finding | None``, called at each logging step; look at the last lines only."""


@hookspec
def dpo_scorers() -> Mapping[str, Scorer | type[BatchScorer]]:  # type: ignore[empty-body]
    """Scorers: ``(prompt, answer, row) -> float``, more is better; ``pairs.scorer: <name>``.

    `row` is the prompt's line of the prompts file. A scorer that wants many answers at once, or settings, is a subclass
    of `dpo_plugin.samples.scorers.BatchScorer`.
    """
