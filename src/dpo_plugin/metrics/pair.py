"""Metrics of single pairs: pure functions of `PairLogps`, and what each of them needs to be computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from torch import Tensor

from dpo_plugin.errors import RegistrationError
from dpo_plugin.types import PairLogps

PreferenceMetric = Callable[[PairLogps], Tensor | None]
"""One value per pair, (pairs,), averaged over pairs and ranks; None where a batch does not have what it needs."""

M = TypeVar("M", bound=PreferenceMetric)

COMPUTED_ON_DEMAND = ("entropy",)
"""What costs time, and is therefore computed only if a logged metric needs it; ``entropy``: of chosen and rejected."""

SATURATED = math.log(99)
"""The margin at which σ(margin) = 0.99: such a pair's gradient is a fiftieth of what it was at margin 0."""


def needs(*quantities: str) -> Callable[[M], M]:
    """Declare what a metric reads besides log-probabilities and lengths: ``@needs("entropy")``.

    Args:
        quantities: Of `COMPUTED_ON_DEMAND`.

    Raises:
        RegistrationError: If a quantity is not one that can be computed.
    """
    for quantity in quantities:
        if quantity not in COMPUTED_ON_DEMAND:
            known = ", ".join(COMPUTED_ON_DEMAND)
            raise RegistrationError(
                f"a metric needs {quantity!r}, which is not computed. Known: {known}. "
                f'Write: @needs("{COMPUTED_ON_DEMAND[0]}")'
            )

    def declare(metric: M) -> M:
        metric.needs = quantities  # type: ignore[attr-defined]
        return metric

    return declare


def needed_by(metrics: Iterable[PreferenceMetric]) -> frozenset[str]:
    """Collect what some metrics declare with `needs`."""
    return frozenset(quantity for metric in metrics for quantity in getattr(metric, "needs", ()))


def margin(logps: PairLogps) -> Tensor:
    """Chosen's reward minus rejected's, (pairs,)."""
    return logps.chosen_rewards - logps.rejected_rewards


def length_normalised_margin(logps: PairLogps) -> Tensor:
    """r_w/n_w − r_l/n_l in nats per token, (pairs,): the margin that length alone cannot raise (arXiv 2405.14734)."""
    chosen = logps.chosen_logratios / logps.chosen_tokens.clamp(min=1)
    return chosen - logps.rejected_logratios / logps.rejected_tokens.clamp(min=1)


TRL_METRICS: Mapping[str, PreferenceMetric] = {
    "rewards/chosen": lambda logps: logps.chosen_rewards,
    "rewards/rejected": lambda logps: logps.rejected_rewards,
    "rewards/accuracies": lambda logps: (logps.chosen_rewards > logps.rejected_rewards).float(),
    "rewards/margins": margin,
    "logps/chosen": lambda logps: logps.policy_chosen_logps,
    "logps/rejected": lambda logps: logps.policy_rejected_logps,
    "logits/chosen": lambda logps: logps.chosen_logits,
    "logits/rejected": lambda logps: logps.rejected_logits,
}
"""What users of TRL know; always logged."""

METRICS: Mapping[str, PreferenceMetric] = {
    **TRL_METRICS,
    "rewards/negative_margins": lambda logps: (margin(logps) < 0).float(),  # unlike 1 − accuracy 0 at step 0
    "rewards/saturated": lambda logps: (margin(logps) > SATURATED).float(),
    "logps/chosen_per_token": lambda logps: logps.policy_chosen_logps / logps.chosen_tokens.clamp(min=1),
    "logps/rejected_per_token": lambda logps: logps.policy_rejected_logps / logps.rejected_tokens.clamp(min=1),
    "logratios/chosen": lambda logps: logps.chosen_logratios,
    "logratios/rejected": lambda logps: logps.rejected_logratios,
    "logratios/margin_per_token": length_normalised_margin,
    "lengths/chosen": lambda logps: logps.chosen_tokens,
    "lengths/rejected": lambda logps: logps.rejected_tokens,
    "entropy/chosen": needs("entropy")(lambda logps: logps.chosen_entropy),
    "entropy/rejected": needs("entropy")(lambda logps: logps.rejected_entropy),
}
"""All metrics that have one value per pair; in nats, nats per token, or tokens. `fields` says what each means."""
