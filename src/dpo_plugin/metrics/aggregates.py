"""What a log line says of all pairs since the line before, over micro-batches and ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpo_plugin.compute.logps import Registered
from dpo_plugin.metrics.pair import PreferenceMetric, margin
from dpo_plugin.types import PairLogps

SOURCES_LOGGED = 20
"""Most sources that get fields of their own; the smaller ones are taken together."""

OTHER_SOURCES = "(other)"
NO_SOURCE = "(none)"

CORRELATED_PAIRS = 8
"""Fewest pairs of which a correlation is logged; with two it is always 1 or −1."""


def pair_columns(logps: PairLogps) -> dict[str, Tensor]:
    """Name → what the figures below need of each pair, (pairs,): rewards, a length difference, nats per token."""
    chosen, rejected = logps.chosen_tokens.clamp(min=1), logps.rejected_tokens.clamp(min=1)
    return {
        "chosen_reward": logps.chosen_rewards,
        "rejected_reward": logps.rejected_rewards,
        "margin": margin(logps),
        "longer": logps.chosen_tokens - logps.rejected_tokens,
        "chosen_logratio": logps.chosen_logratios / chosen,
        "rejected_logratio": logps.rejected_logratios / rejected,
        "chosen_logp": logps.policy_chosen_logps / chosen,
        "rejected_logp": logps.policy_rejected_logps / rejected,
    }


def margin_percentiles(margins: Tensor) -> dict[str, float]:
    """Compute the 10th, 50th and 90th percentile of the margin, (pairs,)."""
    levels = margins.quantile(margins.new_tensor([0.1, 0.5, 0.9])).tolist()
    return {f"rewards/margins_p{share}": level for share, level in zip((10, 50, 90), levels, strict=True)}


def length_figures(margins: Tensor, longer: Tensor) -> dict[str, float]:
    """Say how the margin correlates with length (Park et al. 2024, arXiv 2403.19159).

    Args:
        margins: (pairs,).
        longer: Tokens of chosen minus those of rejected, (pairs,).

    Returns:
        The correlation of margin and length difference, and the accuracy where chosen is the longer and where it is the
        shorter answer; each only where it is defined.
    """
    found = {}
    both = torch.stack([margins, longer])
    centred = both - both.mean(dim=1, keepdim=True)
    norms = centred.norm(dim=1)
    if len(margins) >= CORRELATED_PAIRS and bool((norms.square() > 1e-9 * both.square().sum(dim=1)).all()):
        found["lengths/margin_correlation"] = (centred[0] @ centred[1] / norms.prod()).item()
    for side, rows in (("longer", longer > 0), ("shorter", longer < 0)):
        if rows.any():
            found[f"lengths/accuracy_chosen_{side}"] = (margins[rows] > 0).to(margins.dtype).mean().item()
    return found


def source_figures(sources: Sequence[str | None], margins: Tensor) -> dict[str, float]:
    """Compute accuracy, margin and count of each source.

    Args:
        sources: One per pair; None where no source is known.
        margins: (pairs,).

    Returns:
        Nothing if there is a single source; beyond `SOURCES_LOGGED`, the smaller ones as `OTHER_SOURCES`.
    """
    rows = defaultdict(list)
    for row, source in enumerate(sources):
        if source is not None:
            rows[source or NO_SOURCE].append(row)
    if len(rows) < 2:
        return {}
    by_size = sorted(rows, key=lambda source: (-len(rows[source]), source))
    logged = {source: rows[source] for source in sorted(by_size[:SOURCES_LOGGED])}
    if rest := by_size[SOURCES_LOGGED:]:
        logged[OTHER_SOURCES] = [row for source in rest for row in rows[source]]
    found = {}
    for source, its in logged.items():
        found[f"rewards/accuracies/{source}"] = (margins[its] > 0).to(margins.dtype).mean().item()
        found[f"rewards/margins/{source}"] = margins[its].mean().item()
        found[f"rewards/count/{source}"] = float(len(its))
    return found


class MetricMeans:
    """Metrics of all pairs since the last `result`; keeps tensors on their device and synchronises nothing before.

    It takes about 130 bytes for each pair that is trained on or evaluated between two log lines.

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
        self._tables: list[tuple[tuple[str, ...], Tensor]] = []
        self._sources: list[str | None] = []

    @torch.no_grad()
    def update(self, logps: PairLogps, losses: Mapping[str, Tensor] | None = None) -> None:
        """Add a batch, and the values of single ``losses``, (pairs,), whose means are logged as ``loss/<name>``.

        Raises:
            RegistrationError: If a metric raises, or gives something else than one value per pair; names its owner.
        """
        single = {f"loss/{name}": value for name, value in (losses or {}).items()}
        values = {name: self._value(name, logps) for name in self.metrics} | single
        columns = {name: value for name, value in values.items() if value is not None} | pair_columns(logps)
        self._tables.append((tuple(columns), torch.stack([column.detach().float() for column in columns.values()])))
        pairs = len(logps.policy_chosen_logps)
        self._sources += logps.sources if len(logps.sources) == pairs else [None] * pairs

    def _columns(self) -> dict[str, Tensor]:
        """Name → values of this rank's pairs, (pairs,), on the CPU."""
        parts = defaultdict(list)
        for names, table in self._tables:
            for name, column in zip(names, table.cpu(), strict=True):
                parts[name].append(column)
        return {name: torch.cat(some) for name, some in parts.items()}

    def _value(self, name: str, logps: PairLogps) -> Tensor | None:
        line = f"metrics: [{', '.join(other for other in self.metrics if other != name)}]"
        registered = Registered("metric", name, self._owner, line)
        value = registered.call(partial(self.metrics[name], logps))
        return None if value is None else registered.one_per_pair(value, logps)

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
        ranks: list[tuple[dict[str, Tensor], list[str | None]]] = gather_object((self._columns(), self._sources))
        self._clear()
        names = [*self.metrics, *(name for columns, _ in ranks for name in columns)]
        parts = {name: [columns[name] for columns, _ in ranks if name in columns] for name in dict.fromkeys(names)}
        columns = {name: torch.cat(some).double() for name, some in parts.items() if some}
        if not columns:
            return {}
        self.rewards = torch.stack([columns["chosen_reward"], columns["rejected_reward"]], dim=1).float()
        margins = columns["margin"]
        single = [name for name in columns if name.startswith("loss/")]
        found = {name: columns[name].mean().item() for name in (*self.metrics, *single) if name in columns}
        found |= {"rewards/count": float(len(margins)), **margin_percentiles(margins)}
        found |= length_figures(margins, columns["longer"])
        found |= self._displacement(columns) if since_start else {}
        return found | source_figures([source for _, sources in ranks for source in sources], margins)

    def _displacement(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """Change of the log-probs since step 0 in nats per token (likelihood displacement, arXiv 2410.08847)."""
        now = columns["chosen_logp"].mean().item(), columns["rejected_logp"].mean().item()
        if self._starts_as_reference:
            moved = columns["chosen_logratio"].mean().item(), columns["rejected_logratio"].mean().item()
        else:
            self.start = self.start or now
            moved = now[0] - self.start[0], now[1] - self.start[1]
        return {"logps/chosen_displacement": moved[0], "logps/rejected_displacement": moved[1]}
