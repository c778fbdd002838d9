"""Whether all ranks are about to run the same thing; otherwise they would wait for each other until a time-out."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from dpo_plugin.errors import RankMismatchError


def facts_of(trainer: Any) -> dict[str, Any]:
    """What must be equal on every rank of a `PreferenceTrainer` before the first step."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    digests = getattr(model, "digests", {})
    return {
        "dpo_plugin's version": importlib.metadata.version("dpo-plugin"),
        "number of micro-steps per epoch": len(trainer.get_train_dataloader()),
        "adapters": ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(digests.items())) or "none",
        "reference": trainer.reference.strategy.identity(),
        "kept reference log-probs": trainer.reference.cache is not None,
        "layout of batches": repr(trainer.data_collator),
        "loss": ", ".join(f"{name} × {weight:g}" for name, (_, weight) in trainer._losses.items()),
    }


def gather_object(value: Any) -> list[Any]:
    """A value of each rank; all ranks must call."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def check_ranks_agree(facts: Mapping[str, Any]) -> None:
    """Compare this rank's facts with those of all others; stops every rank if any differs.

    Raises:
        RankMismatchError: On all ranks, with each difference to rank 0.
    """
    everyone = gather_object(dict(facts))
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
