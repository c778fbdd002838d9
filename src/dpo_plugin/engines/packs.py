"""How a micro-batch is run on several ranks: in as many forwards on each, and every evaluated pair counted once."""

from __future__ import annotations

import math
from typing import Any

import torch


def packs_of(trainer: Any, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The forwards of a micro-batch with their weights; their number is the same on every rank, and all must call.

    Ranks must forward together wherever they gather parameters, gradients, or whether a reference is cached; so a rank
    with fewer packs than another repeats its smallest, of which no pair counts.

    Args:
        trainer: The `PreferenceTrainer`.
        inputs: What `PairCollator` made of the micro-batch.

    Returns:
        Packs whose ``weight`` is their share of the pairs that count, so that the sum of means is the mean of all.
    """
    if "packs" not in inputs:
        return [inputs]
    packs, rows = inputs["packs"], rows_that_count(trainer)
    counts = [sum(place < rows for place in pack["places"]) for pack in packs]
    weighted = [{**pack, "weight": n / max(sum(counts), 1)} for pack, n in zip(packs, counts, strict=True)]
    if trainer.accelerator.num_processes == 1:
        return weighted
    number = torch.tensor([len(packs)], device=trainer.accelerator.device)
    missing = int(trainer.accelerator.gather(number).max()) - len(packs)
    smallest = min(packs, key=lambda pack: int(pack["input_ids"].numel()))
    return [{**smallest, "weight": 0.0, "places": []}] * missing + weighted


def rows_that_count(trainer: Any) -> float:
    """Rows of this rank's micro-batch, from the first on, that are not there to make all ranks' batches equal.

    accelerate fills the last batches of an evaluation with rows that have been seen; only `gather_for_metrics`, which
    transformers calls for the losses, leaves them out.
    """
    state = trainer.accelerator.gradient_state
    if trainer.model.training or not state.end_of_dataloader or state.remainder <= 0:
        return math.inf
    rows = state.active_dataloader.total_batch_size // trainer.accelerator.num_processes
    return int(state.remainder - rows * trainer.accelerator.process_index)
