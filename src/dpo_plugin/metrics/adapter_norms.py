"""How far the trained weights have moved, and how many have moved at all, as the optimizer holds them on any engine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dpo_plugin.engines.master_weights import master_weight
from dpo_plugin.engines.sharded import deepspeed_utils
from dpo_plugin.model.adapters import POLICY, REFERENCE, PolicyReferenceModel

SAMPLED = 2**22
"""Most weights that are measured, evenly spread: 16 MiB for each of the three copies.

Of all weights they would take 2.5 GB per GPU for 72B with r = 16, and under full fine-tuning several times the model.
"""


class AdapterNorms:
    """Measures norms of weight differences over all trained tensors, and the share of values that have moved.

    More than `SAMPLED` weights are sampled at a constant stride, by which the sum of squares is multiplied.

    Args:
        model: Policy and reference, as attached, or the model of full fine-tuning: before an engine shards or casts it.
        moving: Whether the reference moves as well; then no engine may shard it.

    Attributes:
        dtype: Dtype in which the optimizer updates most of the weights; None before the first `figures`.
    """

    def __init__(self, model: nn.Module, moving: bool = False):
        self.dtype: torch.dtype | None = None
        self._sizes = {name: whole_size(parameter) for name, parameter in _trained(model)}
        self._sparse = _embeddings(model)
        self._stride = max(1, math.ceil(sum(self._sizes.values()) / SAMPLED))
        self._moving = moving
        self._sample = self._reference_sample(model)
        self._reference: Tensor | None = None
        self._start: Tensor | None = None
        self._last: Tensor | None = None

    def _reference_sample(self, model: nn.Module) -> dict[str, Tensor]:
        """Sample the reference adapter under the policy's names; empty if shapes differ."""
        named = dict(model.adapter_parameters()) if isinstance(model, PolicyReferenceModel) else {}
        found = {}
        for name, size in self._sizes.items():
            reference = named.get(f"{name}.".replace(f".{POLICY}.", f".{REFERENCE}.")[:-1])
            if reference is None or reference.numel() != size:
                return {}
            found[name] = reference.detach().flatten()[:: self._stride].float().clone()
        return found

    def figures(self, model: nn.Module, total: Callable[[Tensor], Tensor], rank: int) -> dict[str, float]:
        """Measure; every rank must call it.

        Args:
            model: The model as the engine holds it.
            total: Sums a 1-d tensor over ranks; called once.
            rank: This rank; of weights that are whole on all ranks, only rank 0's count.

        Returns:
            ``adapter/distance`` from the reference adapter, if there is one of the policy's shape;
            ``adapter/update_norm``, how far an adapter moved since the last call; and ``weights/changed``, the share of
            values that differ from those of the first call, without embeddings, since the rows of unseen tokens have no
            gradient. The first call returns neither of the last two.
        """
        places, now, dense = self._now(model, rank)
        if now is None:
            return {}
        if self._moving:
            self._sample, self._reference = self._reference_sample(model), None
        if self._sample and self._reference is None:
            held = [self._sample[name][index : index + count] for name, index, count in places]
            self._reference = torch.cat([part.to(now.device) for part in held])
        if self._start is None:
            self._start = now
        changed = (now != self._start)[:dense].sum(dtype=torch.float64)
        counted = torch.tensor(float(dense), dtype=torch.float64, device=now.device)
        sums = [_square_distance(now, self._reference), _square_distance(now, self._last), changed, counted]
        distance, update, moved, values = total(torch.stack(sums)).tolist()
        found = {} if self._reference is None else {"adapter/distance": math.sqrt(distance * self._stride)}
        if self._last is not None:
            if isinstance(model, PolicyReferenceModel):
                found["adapter/update_norm"] = math.sqrt(update * self._stride)
            found |= {"weights/changed": moved / values} if values else {}
        self._last = now
        return found

    def _now(self, model: nn.Module, rank: int) -> tuple[list[tuple[str, int, int]], Tensor | None, int]:
        """Sample what this rank updates, embeddings last.

        Returns:
            Name, index in the sample and number of values of each tensor; the values; how many are not embeddings'.
            No values where an engine renames its tensors.
        """
        places, parts, dense = [], [], 0
        sizes: Counter[torch.dtype] = Counter()
        named = [(name.replace(_CHECKPOINT_PREFIX, ""), parameter) for name, parameter in _trained(model)]
        for name, parameter in sorted(named, key=lambda one: one[0] in self._sparse):
            if name not in self._sizes:
                continue
            part, first, counts = _part(parameter, rank)
            begin = -first % self._stride  # in this part, which may be padded beyond the tensor's end
            mine = part[begin : max(begin, self._sizes[name] - first) : self._stride] if counts else part[:0]
            places.append((name, (first + begin) // self._stride, len(mine)))
            parts.append(mine.float())
            dense += 0 if name in self._sparse else len(mine)
            sizes[part.dtype] += len(part)
        self.dtype = max(sizes, key=sizes.__getitem__, default=None)
        return places, torch.cat(parts) if parts else None, dense  # a copy of its own


def whole_size(parameter: Any) -> int:
    """Count the values of a parameter; the empty tensor that ZeRO-3 leaves behind knows how many it had."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    named = model.policy_parameters() if isinstance(model, PolicyReferenceModel) else model.named_parameters()
    return ((name, parameter) for name, parameter in named if parameter.requires_grad)


def _embeddings(model: nn.Module) -> frozenset[str]:
    """Names of the trained tensors with a row or column per token of the vocabulary."""
    found = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    return frozenset(name for name, p in _trained(model) if id(p) in found or ".lora_embedding_" in name)


def _square_distance(a: Tensor, b: Tensor | None) -> Tensor:
    """Σ (a − b)², fp64; 0 where there is no b."""
    if b is None:
        return torch.zeros((), dtype=torch.float64, device=a.device)
    return (a - b).square_().sum(dtype=torch.float64)


def _part(parameter: Any, rank: int) -> tuple[Tensor, int, bool]:
    """The flat part of a tensor that this rank updates, its first index, and whether this rank counts."""
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
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and -2: fp32, of some tensors a part, of others nothing
        mapping = parameter._hp_mapping
        if mapping is None:
            return torch.empty(0, device=parameter.device), 0, True
        return mapping.hp_fragment.detach().flatten(), mapping.lp_fragment_address.start, True
    return master_weight(parameter).flatten(), 0, rank == 0


def _coordinate(parameter: DTensor) -> list[int]:
    """Find this rank's place in the mesh."""
    return list(parameter.device_mesh.get_coordinate() or [0] * parameter.device_mesh.ndim)
