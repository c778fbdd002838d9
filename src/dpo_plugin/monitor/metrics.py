"""Metrics: pure functions of `PairLogps`, and the mean over pairs, micro-batches and ranks between two log lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dpo_plugin.errors import DPOPluginError
from dpo_plugin.types import PairLogps

PreferenceMetric = Callable[[PairLogps], Tensor]


def chosen_reward(logps: PairLogps) -> Tensor:
    """β (log π − log π_ref) of chosen, (pairs,); should rise or hold."""
    return logps.chosen_rewards


def rejected_reward(logps: PairLogps) -> Tensor:
    """β (log π − log π_ref) of rejected, (pairs,); should fall below chosen's."""
    return logps.rejected_rewards


def accuracy(logps: PairLogps) -> Tensor:
    """1 where chosen's reward is above rejected's, (pairs,); 0 at step 0, where both rewards are 0."""
    return (logps.chosen_rewards > logps.rejected_rewards).float()


def margin(logps: PairLogps) -> Tensor:
    """Chosen's reward minus rejected's, (pairs,)."""
    return logps.chosen_rewards - logps.rejected_rewards


def length_normalised_margin(logps: PairLogps) -> Tensor:
    """r_w/n_w − r_l/n_l in nats per token, (pairs,): the margin that length alone cannot raise (arXiv 2405.14734)."""
    chosen = logps.chosen_logratios / logps.chosen_tokens.clamp(min=1)
    return chosen - logps.rejected_logratios / logps.rejected_tokens.clamp(min=1)


USUAL: Mapping[str, PreferenceMetric] = {
    "rewards/chosen": chosen_reward,
    "rewards/rejected": rejected_reward,
    "rewards/accuracies": accuracy,
    "rewards/margins": margin,
    "logps/chosen": lambda logps: logps.policy_chosen_logps,
    "logps/rejected": lambda logps: logps.policy_rejected_logps,
    "logits/chosen": lambda logps: logps.chosen_logits,
    "logits/rejected": lambda logps: logps.rejected_logits,
}
"""What users of TRL know; always logged."""

METRICS: Mapping[str, PreferenceMetric] = {**USUAL, "logratios/margin_per_token": length_normalised_margin}


class MeanMetrics:
    """Means over all pairs since the last `result`; keeps tensors on their device and synchronises nothing before."""

    def __init__(self, metrics: Mapping[str, PreferenceMetric]):
        self.metrics = dict(metrics)
        self._sums: Tensor | None = None
        self._pairs = 0

    @torch.no_grad()
    def update(self, logps: PairLogps) -> None:
        """Add a batch.

        Raises:
            DPOPluginError: If a metric returns something else than one value per pair.
        """
        pairs = logps.policy_chosen_logps.shape
        values = []
        for name, metric in self.metrics.items():
            value = metric(logps)
            if value.shape != pairs:
                raise DPOPluginError(
                    f"metric {name!r} returned shape {tuple(value.shape)} for {pairs[0]} pairs. Write: return a "
                    "Tensor of shape (pairs,)"
                )
            values.append(value.detach().float().sum())
        sums = torch.stack(values)
        self._sums = sums if self._sums is None else self._sums + sums
        self._pairs += pairs[0]

    def result(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over all ranks, and start anew.

        Args:
            reduce: Sums a 1-d tensor over ranks; called once.

        Returns:
            Name → mean; empty if no pair was seen since the last call.
        """
        if self._sums is None:
            return {}
        total = reduce(torch.cat([self._sums, self._sums.new_tensor([float(self._pairs)])])).tolist()
        self._sums, self._pairs = None, 0
        return {name: value / total[-1] for name, value in zip(self.metrics, total, strict=False)}
