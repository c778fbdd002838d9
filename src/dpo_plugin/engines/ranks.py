"""Ranks that run together: the same settings on each, as many forwards on each, every evaluated pair counted once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dpo_plugin.errors import RankMismatchError


def gather_object(value: Any, group: Any = None) -> list[Any]:
    """Gather a value of each rank; all ranks must call."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value, group=group)
    return everyone


@contextmanager
def patient_group() -> Iterator[Any]:
    """Context with a group of all ranks, on CPUs, that waits a day for work that one of them does alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def check_ranks_agree(facts: Mapping[str, Any], group: Any = None) -> None:
    """Compare this rank's facts with all others', since ranks that differ would wait for each other until a time-out.

    Raises:
        RankMismatchError: On all ranks, with each difference to rank 0.
    """
    everyone = gather_object(dict(facts), group)
    differences = [
        f"rank {rank}: {name} is {theirs.get(name)}, on rank 0 it is {everyone[0].get(name)}"
        for rank, theirs in enumerate(everyone)
        for name in sorted({*theirs, *everyone[0]})
        if theirs.get(name) != everyone[0].get(name)
    ]
    if differences:
        raise RankMismatchError(
            f"the ranks are about to run different things. {'; '.join(differences)}. Give all nodes the same config, "
            "data, adapters and packages: run `pip install dpo-plugin==<one version>` and check the paths on each"
        )


def on_any_rank(accelerator: Any, condition: bool) -> bool:
    """Find out whether a condition holds on any rank; all ranks must call."""
    if accelerator.num_processes == 1:
        return condition
    flag = torch.tensor([float(condition)], device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum").item())


def packs_of(accelerator: Any, inputs: dict[str, Any], training: bool) -> list[dict[str, Any]]:
    """Split a micro-batch into its forwards; their number is the same on every rank, and all must call.

    Ranks must forward together wherever they gather parameters, gradients, or whether a reference is cached; so a rank
    with fewer packs than another repeats its smallest, of which no pair counts.

    Args:
        accelerator: The trainer's.
        inputs: What `PairCollator` made of the micro-batch, or one of the packs that this function has returned.
        training: Whether it is trained on, rather than evaluated.

    Returns:
        Packs whose ``counted`` are the indices of the pairs that count, and whose ``weight`` is their share of them, so
        that the sum of means is the mean of all.
    """
    if "counted" in inputs:
        return [inputs]
    rows = rows_that_count(accelerator, training)
    packs = inputs.get("packs", [inputs])
    counted = [[n for n, place in enumerate(pack["places"]) if place < rows] for pack in packs]
    every = max(sum(map(len, counted)), 1)
    if "packs" not in inputs:
        return [{**inputs, "counted": counted[0], "weight": 1.0}]
    weighted = [{**pack, "counted": own, "weight": len(own) / every} for pack, own in zip(packs, counted, strict=True)]
    if accelerator.num_processes == 1:
        return weighted
    number = torch.tensor([len(packs)], device=accelerator.device)
    missing = int(accelerator.gather(number).max()) - len(packs)
    smallest = min(packs, key=lambda pack: int(pack["input_ids"].numel()))
    return [{**smallest, "counted": [], "weight": 0.0}] * missing + weighted


@contextmanager
def without_exchange(accelerator: Any, model: Any) -> Iterator[None]:
    """Context in which backward neither reduces gradients over ranks nor, under DeepSpeed, steps the optimizer."""
    if getattr(accelerator.state, "deepspeed_plugin", None) is None:
        with accelerator.no_sync(model):
            yield
        return
    state = accelerator.gradient_state
    before = state.sync_gradients
    state._set_sync_gradients(False)
    try:
        yield
    finally:
        state._set_sync_gradients(before)


def rows_that_count(accelerator: Any, training: bool) -> float:
    """Count this rank's rows, from the first on, that are not there to make all ranks' batches equal.

    accelerate fills the last batches of an evaluation with rows that have been seen; only `gather_for_metrics`, which
    transformers calls for the losses, leaves them out.
    """
    state = accelerator.gradient_state
    if training or not state.end_of_dataloader or state.remainder <= 0:
        return math.inf
    rows = state.active_dataloader.total_batch_size // accelerator.num_processes
    return int(state.remainder - rows * accelerator.process_index)
