"""What a log line says of all pairs since the line before, over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_plugin.compute.logps import sum_dtype
from dpo_plugin.errors import DPOPluginError
from dpo_plugin.metrics.pair import PreferenceMetric
from dpo_plugin.types import PairLogps

PAIRS_KEPT = 4096
"""Most pairs whose rewards a rank keeps between two log lines."""

SOURCES_LOGGED = 20
"""Most sources that get fields of their own; the smaller ones are summed up."""

OTHER_SOURCES = "(other)"
NO_SOURCE = "(none)"

CORRELATED_PAIRS = 8
"""Fewest pairs of which a correlation is logged; with two it is always 1 or −1."""

SUMS = (
    "margin", "longer", "margin²", "longer²", "margin·longer",
    "chosen_longer", "right_longer", "chosen_shorter", "right_shorter",
    "chosen_logratio", "rejected_logratio", "chosen_logp", "rejected_logp",
)  # fmt: skip
"""What `pair_sums` sums over pairs: margins, length differences in tokens, and nats per token."""


def pair_sums(logps: PairLogps) -> Tensor:
    """Sum over a batch what `SUMS` names, (13,)."""
    dtype = sum_dtype(logps.policy_chosen_logps.device)
    margin = (logps.chosen_rewards - logps.rejected_rewards).to(dtype)
    longer = (logps.chosen_tokens - logps.rejected_tokens).to(dtype)
    right, above, below = (margin > 0).to(dtype), (longer > 0).to(dtype), (longer < 0).to(dtype)
    chosen, rejected = logps.chosen_tokens.clamp(min=1).to(dtype), logps.rejected_tokens.clamp(min=1).to(dtype)
    columns = (
        margin, longer, margin * margin, longer * longer, margin * longer,
        above, above * right, below, below * right,
        logps.chosen_logratios / chosen, logps.rejected_logratios / rejected,
        logps.policy_chosen_logps / chosen, logps.policy_rejected_logps / rejected,
    )  # fmt: skip
    return torch.stack([column.to(dtype) for column in columns]).sum(dim=1)


def length_figures(sums: Mapping[str, float], pairs: float) -> dict[str, float]:
    """Say how the margin correlates with length (Park et al. 2024, arXiv 2403.19159).

    Args:
        sums: Values of `SUMS` over all ranks.
        pairs: How many pairs they are of.

    Returns:
        The correlation of margin and length difference, and the accuracy where chosen is the longer and where it is the
        shorter answer; each only where it is defined.
    """
    found = {}
    spread = [sums[f"{name}²"] - sums[name] ** 2 / pairs for name in ("margin", "longer")]
    enough = [left > 1e-9 * sums[f"{name}²"] for left, name in zip(spread, ("margin", "longer"), strict=True)]
    if pairs >= CORRELATED_PAIRS and all(enough):
        together = sums["margin·longer"] - sums["margin"] * sums["longer"] / pairs
        found["lengths/margin_correlation"] = together / math.sqrt(spread[0] * spread[1])
    for side in ("longer", "shorter"):
        if sums[f"chosen_{side}"]:
            found[f"lengths/accuracy_chosen_{side}"] = sums[f"right_{side}"] / sums[f"chosen_{side}"]
    return found


class RewardSample:
    """Rewards of single pairs, at most `PAIRS_KEPT`: all, then every second, then every fourth, and so on."""

    def __init__(self) -> None:
        self.kept = 0
        self._parts: list[Tensor] = []
        self._stride = 1
        self._next = 0  # index of the next pair to keep, counted from the beginning of the next batch

    def add(self, rewards: Tensor) -> None:
        """Add rewards of chosen and rejected, (pairs, 2)."""
        picked = rewards[self._next :: self._stride]
        self._next += len(picked) * self._stride - len(rewards)
        self._parts.append(picked)
        self.kept += len(picked)
        while self.kept > PAIRS_KEPT:
            self._next += self._stride * (self.kept % 2)
            self._stride *= 2
            self._parts = [torch.cat(self._parts)[::2]]
            self.kept = len(self._parts[0])

    def rewards(self) -> Tensor:
        """Rewards of chosen and rejected of the kept pairs, (kept, 2), fp32 on the CPU."""
        return torch.cat(self._parts).float().cpu() if self._parts else torch.empty(0, 2)


def margin_percentiles(rewards: Tensor) -> dict[str, float]:
    """The 10th, 50th and 90th percentile of the margin over rewards of chosen and rejected, (pairs, 2)."""
    levels = torch.quantile(rewards[:, 0] - rewards[:, 1], torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {f"rewards/margins_p{share}": level for share, level in zip((10, 50, 90), levels, strict=True)}


class SourceTally:
    """Pairs, right pairs and margins by source."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self._sums: Tensor | None = None

    def add(self, sources: Sequence[str], margins: Tensor) -> None:
        """Add a batch: one source per pair, and margins (pairs,)."""
        if len(sources) != len(margins):
            return
        rows = [self._index.setdefault(source or NO_SOURCE, len(self._index)) for source in sources]
        dtype = sum_dtype(margins.device)
        new = margins.new_zeros((len(self._index), 3), dtype=dtype)
        values = torch.stack([torch.ones_like(margins), (margins > 0).float(), margins], dim=1).to(dtype)
        new.index_add_(0, torch.tensor(rows, device=margins.device), values)
        if self._sums is not None:
            new[: len(self._sums)] += self._sums
        self._sums = new

    def sums(self) -> dict[str, list[float]]:
        """Source → pairs, right pairs, sum of margins."""
        return dict(zip(self._index, [] if self._sums is None else self._sums.tolist(), strict=True))


def source_figures(ranks: Sequence[Mapping[str, list[float]]]) -> dict[str, float]:
    """Accuracy, margin and count of each source.

    Args:
        ranks: Each rank's `SourceTally.sums`.

    Returns:
        Nothing if there is a single source; beyond `SOURCES_LOGGED`, the smaller ones as `OTHER_SOURCES`.
    """
    names = {source for one in ranks for source in one}
    total = {name: [sum(column) for column in zip(*(one[name] for one in ranks if name in one), strict=True)]
             for name in names}  # fmt: skip
    if len(total) < 2:
        return {}
    by_size = sorted(total, key=lambda source: (-total[source][0], source))
    kept = {source: total[source] for source in sorted(by_size[:SOURCES_LOGGED])}
    if rest := [total[source] for source in by_size[SOURCES_LOGGED:]]:
        kept[OTHER_SOURCES] = [sum(column) for column in zip(*rest, strict=True)]
    found = {}
    for source, (pairs, right, margin) in kept.items():
        found[f"rewards/accuracies/{source}"] = right / pairs
        found[f"rewards/margins/{source}"] = margin / pairs
        found[f"rewards/count/{source}"] = pairs
    return found


@dataclass(frozen=True)
class _RankTotals:
    """What one rank has seen since the last log line; ``sums`` are those of the metrics, then `SUMS`."""

    sums: list[float]
    counts: list[int]
    pairs: int
    rewards: Tensor
    sources: dict[str, list[float]]


class MetricMeans:
    """Metrics of all pairs since the last `result`; keeps tensors on their device and synchronises nothing before.

    Besides the means of ``metrics`` it gives percentiles of the margin, how the margin correlates with length, the
    log-probs against step 0, and accuracy, margin and count by source.

    Args:
        metrics: Name → metric.
        owner: Name of a metric → who registered it, for errors.
        starts_as_reference: Whether the reference is what the policy started from. Then a log-ratio is the change since
            step 0 of the very same pair; otherwise the first line of this object stands for step 0.

    Attributes:
        start: Mean log-prob per token of chosen and rejected, in nats, that stands for step 0; set by a caller that
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
        device, pairs = logps.policy_chosen_logps.device, len(logps.policy_chosen_logps)
        nothing = torch.zeros((), dtype=sum_dtype(device), device=device)
        values = [self._value(name, logps) for name in self.metrics]
        means = [nothing if value is None else value.to(nothing.dtype).sum() for value in values]
        sums = torch.stack([*means, *pair_sums(logps)])
        self._sums = sums if self._sums is None else self._sums + sums
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
        self, gather_object: Callable[[Any], list[Any]] = lambda value: [value], since_start: bool = True
    ) -> dict[str, float]:
        """Compute the metrics over all ranks, and start anew. Every rank must call it, and gets the same.

        Args:
            gather_object: Returns the list of every rank's object; called once.
            since_start: Whether there is a step 0 to measure from; an evaluation without training has none.

        Returns:
            Name → value; empty if no rank has seen a pair since the last call.
        """
        sums = [] if self._sums is None else self._sums.tolist()
        mine = _RankTotals(sums, self._counts, self._pairs, self._sample.rewards(), self._sources.sums())
        self._clear()
        ranks: list[_RankTotals] = [rank for rank in gather_object(mine) if rank.pairs]
        if not ranks:
            return {}
        pairs = sum(rank.pairs for rank in ranks)
        totals = [sum(column) for column in zip(*(rank.sums for rank in ranks), strict=True)]
        counts = [sum(column) for column in zip(*(rank.counts for rank in ranks), strict=True)]
        self.rewards = torch.cat([rank.rewards for rank in ranks])
        by_name = dict(zip(SUMS, totals[len(counts) :], strict=True))
        found = {name: total / count for name, total, count in zip(self.metrics, totals, counts, strict=False) if count}
        found |= {"rewards/count": float(pairs), **margin_percentiles(self.rewards), **length_figures(by_name, pairs)}
        found |= self._displacement(by_name, pairs) if since_start else {}
        return found | source_figures([rank.sources for rank in ranks])

    def _displacement(self, sums: Mapping[str, float], pairs: float) -> dict[str, float]:
        """Change of the log-probs since step 0 in nats per token (likelihood displacement, arXiv 2410.08847)."""
        now = sums["chosen_logp"] / pairs, sums["rejected_logp"] / pairs
        if self._starts_as_reference:
            moved = sums["chosen_logratio"] / pairs, sums["rejected_logratio"] / pairs
        else:
            self.start = self.start or now
            moved = now[0] - self.start[0], now[1] - self.start[1]
        return {"logps/chosen_displacement": moved[0], "logps/rejected_displacement": moved[1]}
