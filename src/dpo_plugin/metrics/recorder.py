"""The metrics that are added to a log line, over all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpo_plugin.engines.ranks import gather_object
from dpo_plugin.metrics.adapter_norms import AdapterNorms
from dpo_plugin.metrics.aggregates import MetricMeans
from dpo_plugin.metrics.pair import PreferenceMetric
from dpo_plugin.types import PairBatch, PairLogps

SHOWN_PAIRS = 500
"""Most pairs whose rewards the report draws."""


class Throughput:
    """Counts pairs, tokens, shared tokens and cached reference log-probs from when it is made."""

    def __init__(self) -> None:
        self._counts = [0.0] * 5
        self._started = time.perf_counter()

    def add(self, batch: PairBatch, fresh: bool) -> None:
        """Count a batch that was trained on; ``fresh``: the reference was run for it."""
        computed = batch.input_ids.numel()
        shared = sum(prefix for prefix, _, _ in batch.segments)
        counts = (batch.num_pairs, computed, shared, computed + shared, 0.0 if fresh else batch.num_pairs)
        self._counts = [before + now for before, now in zip(self._counts, counts, strict=True)]

    def result(self, total: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Compute the figures over all ranks; ``total`` sums a 1-d tensor over them.

        Returns:
            Pairs and computed tokens per second; the share of tokens that sharing prefixes saved; the share of pairs
            whose reference log-probs were cached; on CUDA, this rank's highest memory since the start in GiB.
        """
        seconds = max(time.perf_counter() - self._started, 1e-9)
        pairs, tokens, shared, separate, kept = total(torch.tensor(self._counts, dtype=torch.float32)).tolist()
        figures = {
            "speed/pairs_per_second": pairs / seconds,
            "speed/tokens_per_second": tokens / seconds,
            "speed/shared_tokens": shared / max(separate, 1.0),
            "speed/reference_cache_hits": kept / max(pairs, 1.0),
        }
        if device.type == "cuda":
            figures["memory/peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return figures


class MetricRecorder:
    """Collects metrics from forwards, and averages them over ranks for a log line; arguments as of `MetricMeans`."""

    def __init__(
        self,
        accelerator: Any,
        metrics: Mapping[str, PreferenceMetric],
        owner: Callable[[str], str],
        adapter_norms: AdapterNorms,
        starts_as_reference: bool,
    ):
        self._accelerator = accelerator
        self._means = {mode: MetricMeans(metrics, owner, starts_as_reference) for mode in ("train", "eval")}
        self._adapter_norms = adapter_norms
        self._throughput = Throughput()
        self._rewards: dict[str, dict[str, tuple[int, Tensor]]] = {}
        self._noted: dict[str, float] = {}

    def note(self, fields: Mapping[str, float]) -> None:
        """Add fields to the next line of training."""
        self._noted.update(fields)

    def add(
        self,
        logps: PairLogps,
        batch: PairBatch,
        fresh: bool,
        training: bool,
        losses: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add the pairs that count of a forwarded batch; ``fresh``: the reference was run for it."""
        self._means["train" if training else "eval"].update(logps, losses)
        if training:
            self._throughput.add(batch, fresh)

    def fields(self, model: nn.Module, prefix: str, step: int, since_start: bool) -> dict[str, float]:
        """Average metrics over all pairs of all ranks since the last line; every rank must call it.

        Args:
            model: The model as the engine holds it; in eval mode, the line is of an evaluation.
            prefix: Put before each name.
            step: Optimizer steps done.
            since_start: Whether there is a step 0 to measure from; an evaluation without training has none.

        Returns:
            Name → value; empty if no rank has seen a pair.
        """
        means = self._means["train" if model.training else "eval"]
        found = means.result(gather_object, since_start)
        if not found:
            return {}
        if model.training:
            found |= self.adapter_norms(model) | self._throughput.result(self._sum, self._accelerator.device)
            found |= self._noted
            self._throughput, self._noted = Throughput(), {}
        now = step, means.rewards
        self._rewards.setdefault(prefix, {"start": now})["end"] = now
        return {f"{prefix}{name}": value for name, value in found.items()}

    def reward_course(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Give prefix of fields → ``start``, ``end`` → the step and rewards of at most `SHOWN_PAIRS` pairs."""
        return {
            prefix: {when: {"step": step, **_columns(rewards)} for when, (step, rewards) in course.items()}
            for prefix, course in self._rewards.items()
        }

    def adapter_norms(self, model: nn.Module) -> dict[str, float]:
        """Measure how far the trained weights have gone, and how many moved; every rank must call it."""
        return self._adapter_norms.figures(model, self._sum, self._accelerator.process_index)

    def trained_dtype(self) -> str | None:
        """Name the dtype in which the optimizer updates most weights; known from the first `adapter_norms` on."""
        dtype = self._adapter_norms.dtype
        return None if dtype is None else str(dtype).removeprefix("torch.")

    def remember_start(self, lines: Sequence[dict[str, Any]]) -> None:
        """Measure displacement in a resumed run from the log-probs per token of its first line."""
        names = ("logps/chosen_per_token", "logps/rejected_per_token")
        for mode, prefix in (("train", ""), ("eval", "eval_")):
            start = next((line for line in lines if all(prefix + name in line for name in names)), None)
            if start is not None:
                self._means[mode].start = (start[prefix + names[0]], start[prefix + names[1]])

    def _sum(self, values: Tensor) -> Tensor:
        total: Tensor = self._accelerator.reduce(values.to(self._accelerator.device), reduction="sum")
        return total


def _columns(rewards: Tensor) -> dict[str, list[float]]:
    few = rewards[:: max(1, -(-len(rewards) // SHOWN_PAIRS))].T.tolist()
    return {
        side: [float(f"{value:.4g}") for value in values]
        for side, values in zip(("chosen", "rejected"), few, strict=True)
    }
