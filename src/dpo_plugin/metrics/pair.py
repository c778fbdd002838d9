"""Metrics: pure functions of `PairLogps`, and what becomes of them between two log lines, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dpo_plugin.compute.logps import sum_dtype
from dpo_plugin.errors import DPOPluginError
from dpo_plugin.metrics.aggregates import (
    SUMS,
    RewardSample,
    SourceTally,
    length_figures,
    margin_percentiles,
    pair_sums,
)
from dpo_plugin.types import PairLogps

PreferenceMetric = Callable[[PairLogps], Tensor | None]
"""One value per pair, (pairs,), averaged over pairs and ranks; None where a batch does not have what it needs."""

SATURATED = math.log(99)
"""The margin at which σ(margin) = 0.99: such a pair's gradient is a fiftieth of what it was at margin 0."""


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


def negative_margin(logps: PairLogps) -> Tensor:
    """1 where the margin is below 0, (pairs,); unlike 1 − accuracy it is 0 at step 0. Should fall."""
    return (margin(logps) < 0).float()


def saturated(logps: PairLogps) -> Tensor:
    """1 where σ(margin) > 0.99, (pairs,): pairs that teach nothing more. Should rise late, if at all."""
    return (margin(logps) > SATURATED).float()


TRL_METRICS: Mapping[str, PreferenceMetric] = {
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

METRICS: Mapping[str, PreferenceMetric] = {
    **TRL_METRICS,
    "rewards/negative_margins": negative_margin,
    "rewards/saturated": saturated,
    "logps/chosen_per_token": lambda logps: logps.policy_chosen_logps / logps.chosen_tokens.clamp(min=1),
    "logps/rejected_per_token": lambda logps: logps.policy_rejected_logps / logps.rejected_tokens.clamp(min=1),
    "logratios/chosen": lambda logps: logps.chosen_logratios,
    "logratios/rejected": lambda logps: logps.rejected_logratios,
    "logratios/margin_per_token": length_normalised_margin,
    "lengths/chosen": lambda logps: logps.chosen_tokens,
    "lengths/rejected": lambda logps: logps.rejected_tokens,
    "entropy/chosen": lambda logps: logps.chosen_entropy,
    "entropy/rejected": lambda logps: logps.rejected_entropy,
}
"""All that are one value per pair; nats, or nats per token, or tokens."""


class MetricMeans:
    """Metrics of all pairs since the last `result`; keeps tensors on their device and synchronises nothing before.

    Beside the means of ``metrics`` it gives what is no mean over pairs: percentiles of the margin, how the margin goes
    with the length, the log-probs against step 0, and accuracy, margin and count by source.

    Args:
        metrics: Name → metric.
        owner: Name of a metric → who registered it, for errors.
        starts_as_reference: Whether the reference is what the policy started from. Then a log-ratio is the change since
            step 0 of the very same pair; otherwise the first line of this object stands for step 0.

    Attributes:
        start: Mean log-prob per token of chosen and rejected, in nats, that stands for step 0; kept by a caller that
            resumes.
        rewards: Rewards of chosen and rejected of single pairs of all ranks, (pairs, 2), as of the last `result`.
    """

    def __init__(
        self,
        metrics: Mapping[str, PreferenceMetric],
        owner: Callable[[str], str] = lambda _: "dpo_plugin",
        starts_as_reference: bool = True,
    ):
        self.metrics = dict(metrics)
        self.start: tuple[float, float] | None = None
        self.rewards = torch.empty(0, 2)
        self._owner = owner
        self._starts_as_reference = starts_as_reference
        self._device = torch.device("cpu")
        self._clear()

    def _clear(self) -> None:
        self._sums: Tensor | None = None
        self._counts = [0] * len(self.metrics)
        self._pairs = 0
        self._sample = RewardSample()
        self._sources = SourceTally()

    @torch.no_grad()
    def update(self, logps: PairLogps) -> None:
        """Add a batch.

        Raises:
            DPOPluginError: If a metric raises, or returns something else than one value per pair; names its owner.
        """
        self._device = logps.policy_chosen_logps.device
        dtype = sum_dtype(self._device)
        nothing = torch.zeros((), dtype=dtype, device=self._device)
        values = [self._value(name, logps) for name in self.metrics]
        means = torch.stack([nothing if value is None else value.to(dtype).sum() for value in values] or [nothing])
        sums = torch.cat([means[: len(values)], pair_sums(logps)])
        self._sums = sums if self._sums is None else self._sums + sums
        pairs = len(logps.policy_chosen_logps)
        self._counts = [count + (value is not None) * pairs for count, value in zip(self._counts, values, strict=True)]
        self._pairs += pairs
        rewards = torch.stack([logps.chosen_rewards, logps.rejected_rewards], dim=1).detach()
        self._sample.add(rewards)
        self._sources.add(logps.sources, rewards[:, 0] - rewards[:, 1])

    def _value(self, name: str, logps: PairLogps) -> Tensor | None:
        pairs = logps.policy_chosen_logps.shape
        others = ", ".join(other for other in self.metrics if other != name)
        without = f"Update or uninstall its package, or leave it out. Write: metrics: [{others}]"
        try:
            value: Any = self.metrics[name](logps)
        except Exception as error:
            raise DPOPluginError(
                f"metric {name!r} of {self._owner(name)} raised {type(error).__name__}: {error}. {without}"
            ) from error
        if value is None:
            return None
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        if not isinstance(value, Tensor) or value.shape != pairs:
            raise DPOPluginError(
                f"metric {name!r} of {self._owner(name)} returned {found} for {pairs[0]} pairs, not a Tensor of shape "
                f"({pairs[0]},). {without}"
            )
        return value.detach()

    def result(
        self,
        reduce: Callable[[Tensor], Tensor],
        gather: Callable[[Tensor], Tensor] = lambda values: values,
        gather_object: Callable[[Any], list[Any]] = lambda value: [value],
        since_start: bool = True,
    ) -> dict[str, float]:
        """Metrics over all ranks, and start anew. Every rank must call it; what is left out on one is on all.

        Args:
            reduce: Sums a 1-d tensor over ranks, on whatever device it comes; called once.
            gather: Concatenates 1-d tensors of equal size over ranks; called once if any rank has a pair.
            gather_object: Returns the list of every rank's object; called once if there is more than one source.
            since_start: Whether there is a step 0 to measure from; an evaluation without training has none.

        Returns:
            Name → value; empty if no rank has seen a pair since the last call.
        """
        total = self._reduce(reduce)
        names, rest = list(self.metrics), total[2 * len(self.metrics) :]
        pairs, kept, marks = rest[0], int(rest[1]), rest[2:6]
        if not pairs:
            return {}
        sums = dict(zip(SUMS, rest[6:], strict=True))
        means = zip(names, total[: len(names)], total[len(names) : 2 * len(names)], strict=True)
        found = {name: value / count for name, value, count in means if count}
        self.rewards = self._sample.gathered(kept, self._device, gather)
        found |= {"rewards/count": pairs, **margin_percentiles(self.rewards)}
        found |= {**length_figures(sums, pairs), **(self._displacement(sums, pairs) if since_start else {})}
        if SourceTally.several(marks):
            found |= self._sources.figures(gather_object)
        self._clear()
        return found

    def _reduce(self, reduce: Callable[[Tensor], Tensor]) -> list[float]:
        """Sums of metrics, their counts, pairs, kept margins, fingerprint of sources, `SUMS`; over all ranks."""
        size, dtype = len(self.metrics), sum_dtype(self._device)
        empty = torch.zeros(size + len(SUMS), dtype=dtype, device=self._device)
        sums = empty if self._sums is None else self._sums
        counted = [*self._counts, self._pairs, self._sample.kept, *self._sources.fingerprint()]
        middle = torch.tensor(counted, dtype=dtype, device=self._device)
        values: list[float] = reduce(torch.cat([sums[:size], middle, sums[size:]])).tolist()
        return values

    def _displacement(self, sums: Mapping[str, float], pairs: float) -> dict[str, float]:
        """Change of the log-probs since step 0 in nats per token (likelihood displacement, arXiv 2410.08847)."""
        now = sums["chosen_logp"] / pairs, sums["rejected_logp"] / pairs
        if self._starts_as_reference:
            moved = sums["chosen_logratio"] / pairs, sums["rejected_logratio"] / pairs
        else:
            self.start = self.start or now
            moved = now[0] - self.start[0], now[1] - self.start[1]
        return {"logps/chosen_displacement": moved[0], "logps/rejected_displacement": moved[1]}
