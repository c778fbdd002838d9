"""How fast a run goes and what it saves, between two log lines and over all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from dpo_plugin.types import PairBatch


class Throughput:
    """Counts pairs, tokens, shared tokens and cached reference log-probs since the last `result`."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._counts = [0.0] * 5
        self._started = time.perf_counter()

    def add(self, batch: PairBatch, fresh: bool) -> None:
        """Count a batch that was trained on.

        Args:
            batch: The pairs.
            fresh: Whether the reference was run for it.
        """
        computed = batch.input_ids.numel()
        shared = sum(prefix for prefix, _, _ in batch.segments)
        counts = (batch.num_pairs, computed, shared, computed + shared, 0.0 if fresh else batch.num_pairs)
        self._counts = [before + now for before, now in zip(self._counts, counts, strict=True)]

    def result(self, total: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Compute the figures over all ranks, and start anew.

        Args:
            total: Sums a 1-d tensor over ranks; called once.
            device: Where memory is measured.

        Returns:
            Pairs and computed tokens per second; the share of tokens that sharing prefixes saved; the share of pairs
            whose reference log-probs were cached; on CUDA, this rank's highest memory since the start in GiB.
        """
        seconds = max(time.perf_counter() - self._started, 1e-9)
        pairs, tokens, shared, separate, kept = total(torch.tensor(self._counts, dtype=torch.float32)).tolist()
        self._clear()
        figures = {
            "speed/pairs_per_second": pairs / seconds,
            "speed/tokens_per_second": tokens / seconds,
            "speed/shared_tokens": shared / max(separate, 1.0),
            "speed/reference_cache_hits": kept / max(pairs, 1.0),
        }
        if device.type == "cuda":
            figures["memory/peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return figures
