"""A reference behind its cache, which is verified before it is trusted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_plugin.model.cache import ReferenceLogpCache, deviation
from dpo_plugin.model.references import Forward, ReferenceStrategy
from dpo_plugin.types import PairBatch

CHECKED = 4
"""Batches at the start of a run whose cached log-probs are compared with a forward's."""


class CachedReference:
    """A reference strategy behind a cache: runs the reference only for rows that are not cached yet.

    The first batches with rows from disk are run anyway: if the cached log-probs are not those of this reference,
    although their key is, all of them are dropped and computed again.

    Args:
        strategy: The strategy.
        cache: The cache, or None.
        on_any_rank: Tells whether a condition holds on any rank, since ranks must forward together.
        tolerance: Most that cached log-probs may be off, as `deviation` measures it.
        warn: Takes a message for the user.

    Attributes:
        forwards: Batches for which the reference was run because log-probs were missing.
        fresh: Whether the reference was run for the last batch.
    """

    def __init__(
        self,
        strategy: ReferenceStrategy,
        cache: ReferenceLogpCache | None,
        on_any_rank: Callable[[bool], bool],
        tolerance: float = 1e-3,
        warn: Callable[[str], None] = warnings.warn,
    ):
        self.strategy = strategy
        self.cache = cache
        self.on_any_rank = on_any_rank
        self.tolerance = tolerance
        self.warn = warn
        self.forwards = 0
        self.fresh = True
        self._unchecked = CHECKED

    def logps(self, model: Any, batch: PairBatch, forward: Forward, anew: bool = False) -> Tensor:
        """Get log-probs, (pairs, 2) fp32 nats; from the cache if every rank has all of its rows there.

        Args:
            model: As in `ReferenceStrategy.run`.
            batch: The pairs.
            forward: As in `ReferenceStrategy.run`.
            anew: Run the reference even if all rows are cached; equal on all ranks.
        """
        if self.cache is None:
            self.forwards += 1
            return self.strategy.logps(model, batch, forward)
        cached = self.cache.get(batch.row_hashes, batch.input_ids.device)
        missing = self.on_any_rank(cached is None)
        read = self.cache.read(batch.row_hashes) if anew or self._unchecked > 0 else None
        check = anew or (read is not None and self.on_any_rank(not read.isnan().all()))
        self.fresh = missing or check
        if cached is not None and not self.fresh:
            return cached
        self.forwards += missing
        logps = self.strategy.logps(model, batch, forward)
        if read is not None and check:
            self._unchecked -= 1
            self._compare(self.cache, read, logps, batch)
        self.cache.put(batch.row_hashes, logps)
        return logps

    def _compare(self, cache: ReferenceLogpCache, read: Tensor, logps: Tensor, batch: PairBatch) -> None:
        tokens = torch.tensor(batch.lengths).reshape(2, -1).T
        if not self.on_any_rank(deviation(read, logps.cpu(), tokens) > self.tolerance):
            return
        cache.forget()
        self.warn(
            f"dpo_plugin: the reference log-probs cached in {cache.folder} are not those of this reference: they are "
            f"off by more than rounding explains ({self.tolerance} nats per square root of a token). The base model's "
            "weights have changed, or a package computes it differently. They are dropped and computed again"
        )
