"""Sums that become percentiles, correlations and figures by source when a line is logged, right over all ranks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_plugin.compute.logps import sum_dtype
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
    """The sums of a batch that `SUMS` names, (13,)."""
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
    """How far the margin goes with the length (Park et al. 2024, arXiv 2403.19159).

    Args:
        sums: Values of `SUMS` over all ranks.
        pairs: How many pairs they are of.

    Returns:
        The correlation of margin and length difference, and the accuracy where chosen is the longer and where it is the
        shorter answer; each only where there is one.
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

    def gathered(self, kept_on_all: int, device: torch.device, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """Rewards of chosen and rejected of the kept pairs of all ranks, (kept, 2).

        Args:
            kept_on_all: Sum of `kept` over ranks; each rank pads to as many, since `gather` wants equal sizes.
            device: Where to pad, on a rank that has none.
            gather: Concatenates 1-d tensors of equal size over ranks.
        """
        rewards = torch.full((min(PAIRS_KEPT, kept_on_all), 2), math.nan, device=device)
        if self._parts:
            rewards[: self.kept] = torch.cat(self._parts).float()
        every = gather(rewards.flatten()).view(-1, 2)
        return every[~every.isnan().any(dim=1)]


def margin_percentiles(rewards: Tensor) -> dict[str, float]:
    """The 10th, 50th and 90th percentile of the margin over rewards of chosen and rejected, (pairs, 2)."""
    if not len(rewards):
        return {}
    shares = torch.tensor([0.1, 0.5, 0.9], device=rewards.device)
    levels = torch.quantile(rewards[:, 0] - rewards[:, 1], shares).tolist()
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

    def fingerprint(self) -> list[float]:
        """Four numbers whose sums over ranks tell whether there is more than one source in all; see `several`."""
        if not self._index:
            return [0.0, 0.0, 0.0, 0.0]
        mark = float(zlib.crc32(next(iter(self._index)).encode()) % 2**20)  # its square sums up exactly in fp64
        return [1.0, mark, mark * mark, float(len(self._index) > 1)]

    @staticmethod
    def several(total: Sequence[float]) -> bool:
        """Whether the summed fingerprints are of more than one source.

        Of n ranks that saw one source each, all saw the same if and only if n Σh² = (Σh)² (Cauchy-Schwarz).
        """
        ranks, marks, squares, more = total
        return more > 0 or ranks * squares != marks * marks

    def figures(self, gather_object: Callable[[Any], list[Any]]) -> dict[str, float]:
        """Accuracy, margin and count of each source over all ranks.

        Args:
            gather_object: Returns a list of every rank's object.
        """
        rows = [] if self._sums is None else self._sums.tolist()
        mine = dict(zip(self._index, rows, strict=True))
        total: dict[str, list[float]] = {}
        for theirs in gather_object(mine):
            for source, numbers in theirs.items():
                total[source] = [a + b for a, b in zip(total.get(source, [0.0] * 3), numbers, strict=True)]
        found = {}
        for source, (pairs, right, margin) in _largest(total).items():
            found[f"rewards/accuracies/{source}"] = right / pairs
            found[f"rewards/margins/{source}"] = margin / pairs
            found[f"rewards/count/{source}"] = pairs
        return found


def _largest(total: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The sources by name; beyond `SOURCES_LOGGED`, the smaller ones as one."""
    by_size = sorted(total, key=lambda source: (-total[source][0], source))
    kept = {source: total[source] for source in sorted(by_size[:SOURCES_LOGGED])}
    rest = [total[source] for source in by_size[SOURCES_LOGGED:]]
    return {**kept, OTHER_SOURCES: [sum(column) for column in zip(*rest, strict=True)]} if rest else kept
