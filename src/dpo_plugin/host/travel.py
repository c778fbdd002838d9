"""How far the policy adapter has gone from the reference adapter, and since the last log line, on any engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dpo_plugin.host.distributed import deepspeed_utils
from dpo_plugin.model.adapters import POLICY, REFERENCE, PolicyReferenceModel

SAMPLED = 2**22
"""Most weights that are looked at, evenly spread over the adapter: 16 MiB for each copy."""


class Travel:
    """Norms of weight differences over all policy tensors, in the weights' own unit.

    Adapters of more than `SAMPLED` weights are sampled at a constant stride, and the sum of squares is scaled by it.

    Args:
        model: Policy and reference, as attached: before an engine shards or casts them.
        moving: Whether the reference moves as well; then no engine may shard it.
    """

    def __init__(self, model: PolicyReferenceModel, moving: bool = False):
        self._sizes = {name: parameter.numel() for name, parameter in model.policy_parameters()}
        self._stride = max(1, math.ceil(sum(self._sizes.values()) / SAMPLED))
        self._moving = moving
        self._sample = self._reference_sample(model)
        self._reference: Tensor | None = None
        self._last: Tensor | None = None

    def _reference_sample(self, model: PolicyReferenceModel) -> dict[str, Tensor]:
        """Every stride-th weight of the reference adapter under the policy's names; empty if shapes differ."""
        named = dict(model.adapter_parameters())
        found = {}
        for name, size in self._sizes.items():
            reference = named.get(f"{name}.".replace(f".{POLICY}.", f".{REFERENCE}.")[:-1])
            if reference is None or reference.numel() != size:
                return {}
            found[name] = reference.detach().flatten()[:: self._stride].float().clone()
        return found

    def figures(self, model: PolicyReferenceModel, total: Callable[[Tensor], Tensor], rank: int) -> dict[str, float]:
        """Norms now; every rank must call it.

        Args:
            model: The model as the engine holds it.
            total: Sums a 1-d tensor over ranks; called once.
            rank: This rank; of weights that are whole on all ranks, only rank 0's count.

        Returns:
            ``adapter/distance`` from the reference adapter, left out where it has not the policy's shape or there is
            none, and ``adapter/update_norm``, what the weights moved since the call before, left out in the first.
        """
        places, parts = [], []
        for name, part, first, counts in _parts(model, rank):
            begin = -first % self._stride  # of this part; a padded one is longer than the tensor goes on
            mine = part[begin : max(begin, self._sizes[name] - first) : self._stride] if counts else part[:0]
            places.append((name, (first + begin) // self._stride, len(mine)))
            parts.append(mine.float())
        now = torch.cat(parts)  # a copy of its own
        if self._moving:
            self._sample, self._reference = self._reference_sample(model), None
        if self._sample and self._reference is None:
            held = [self._sample[name][index : index + count] for name, index, count in places]
            self._reference = torch.cat([part.to(now.device) for part in held])
        sums = torch.stack([_square_distance(now, self._reference), _square_distance(now, self._last)])
        distance, update = (total(sums) * self._stride).sqrt().tolist()
        found = {} if self._reference is None else {"adapter/distance": distance}
        if self._last is not None:
            found["adapter/update_norm"] = update
        self._last = now
        return found


def _square_distance(a: Tensor, b: Tensor | None) -> Tensor:
    """Σ (a − b)², fp64; 0 where there is no b."""
    if b is None:
        return torch.zeros((), dtype=torch.float64, device=a.device)
    return (a - b).square_().sum(dtype=torch.float64)


def _parts(model: PolicyReferenceModel, rank: int) -> Iterator[tuple[str, Tensor, int, bool]]:
    """For each policy tensor: name, the flat part that this rank updates, its first index, whether this rank counts."""
    for name, parameter in model.policy_parameters():
        yield name.replace(_CHECKPOINT_PREFIX, ""), *_part(parameter, rank)


def _part(parameter: Any, rank: int) -> tuple[Tensor, int, bool]:
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        local = parameter.to_local().detach()
        replicas = [c for c, p in zip(_coordinate(parameter), parameter.placements, strict=True) if p.is_replicate()]
        return local.flatten(), offset[0] * math.prod(shape[1:]), not any(replicas)
    if hasattr(parameter, "ds_id"):
        size = parameter.ds_tensor.numel()
        local = deepspeed_utils().safe_get_local_fp32_param(parameter)
        return local.detach().flatten(), size * torch.distributed.get_rank(parameter.ds_process_group), True
    return parameter.detach().flatten(), 0, rank == 0


def _coordinate(parameter: DTensor) -> list[int]:
    """Where in the mesh this rank is."""
    return list(parameter.device_mesh.get_coordinate() or [0] * parameter.device_mesh.ndim)
