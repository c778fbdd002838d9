"""Attention of the flat layout: chosen and rejected each see their pair's shared prefix and themselves, nothing else.

It is registered with transformers' `AttentionInterface` under `NAME`; no model class is patched. The segments travel
as the keyword argument ``pair_segments`` through the model's forward, and through the recompute of gradient
checkpointing, to `shared_prefix_attention`. Without that argument it is plain SDPA with SDPA's masks, so evaluation by
generation keeps working. Sharing a prefix within one row: arXiv 2410.20305.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "dpo_plugin_shared_prefix"

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types for which tests hold the flat layout equal to two rows."""

_VARLEN_DTYPES = (torch.float16, torch.bfloat16)


class PairSegments:
    """Where each pair's prefix, chosen and rejected lie in a flat row, with the masks that all layers share.

    Args:
        lengths: Tokens of prefix, rest of chosen, rest of rejected for each pair.
        length: Tokens of the row; what is behind the last pair attends to nothing.
        device: Where the model runs.
    """

    def __init__(self, lengths: Sequence[tuple[int, int, int]], length: int, device: torch.device):
        self.lengths = lengths
        self.padding = length - sum(map(sum, lengths))
        self.device = device
        self._masks: dict[tuple[int, int], Tensor] = {}

    def rejected_mask(self, prefix: int, rejected: int) -> Tensor:
        """Mask rejected, (rejected, prefix + rejected) bool: it sees the whole prefix, and itself causally."""
        key = (prefix, rejected)
        if key not in self._masks:
            ones = torch.ones(rejected, prefix + rejected, dtype=torch.bool, device=self.device)
            self._masks[key] = ones.tril(prefix)
        return self._masks[key]

    @cached_property
    def varlen(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Give key positions, cumulative query and key lengths, and the longest query and key, for `varlen_attn`."""
        start, index, queries, keys = 0, [], [0], [0]
        for prefix, chosen, rejected in self.lengths:
            own = start + prefix + chosen
            index += [torch.arange(start, own), torch.arange(start, start + prefix)]
            index += [torch.arange(own, own + rejected)]
            queries += [queries[-1] + prefix + chosen, queries[-1] + prefix + chosen + rejected]
            keys += [keys[-1] + prefix + chosen, keys[-1] + prefix + chosen + prefix + rejected]
            start = own + rejected
        longest_q, longest_k = (max(b - a for a, b in pairwise(ends)) for ends in (queries, keys))
        ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32, device=self.device) for ends in (queries, keys))
        return torch.cat(index).to(self.device), ends_q, ends_k, longest_q, longest_k


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    pair_segments: PairSegments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers calls it: (1, heads, length, head) in, (1, length, heads, head) out."""
    if pair_segments is None:
        plain = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return plain[0], None
    if query.dtype in _VARLEN_DTYPES and dropout == 0.0 and varlen_works(query.device, query.dtype):
        out = _by_varlen(query, key, value, scaling, pair_segments)
    else:
        out = _by_sdpa(query, key, value, scaling, dropout, pair_segments)
    return out, None


def _by_sdpa(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, segments: PairSegments
) -> Tensor:
    if query.device.type != "cpu":  # with a mask, other kernels than the CPU's do not group heads
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    settings: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    parts, start = [], 0
    for prefix, chosen, rejected in segments.lengths:
        middle, end = start + prefix + chosen, start + prefix + chosen + rejected
        q, k, v = (x[:, :, start:middle] for x in (query, key, value))
        parts.append(scaled_dot_product_attention(q, k, v, is_causal=True, **settings))
        k, v = (torch.cat([x[:, :, start : start + prefix], x[:, :, middle:end]], 2) for x in (key, value))
        mask = segments.rejected_mask(prefix, rejected)
        parts.append(scaled_dot_product_attention(query[:, :, middle:end], k, v, attn_mask=mask, **settings))
        start = end
    if segments.padding:
        parts.append(torch.zeros_like(query[:, :, start:]))
    return torch.cat([part.transpose(1, 2) for part in parts], 1)


def _by_varlen(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, segments: PairSegments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    index, ends_q, ends_k, longest_q, longest_k = segments.varlen
    tokens = query.shape[2] - segments.padding
    queries = query[0, :, :tokens].transpose(0, 1).contiguous()
    keys, values = (x[0].transpose(0, 1)[index] for x in (key, value))
    settings: dict[str, Any] = {"window_size": (-1, 0), "scale": scaling}
    if queries.shape[1] != keys.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            settings["enable_gqa"] = True
        else:
            groups = queries.shape[1] // keys.shape[1]
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    out = varlen_attn(queries, keys, values, ends_q, ends_k, longest_q, longest_k, **settings)
    assert isinstance(out, Tensor)
    return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, segments.padding))[None]


@cache
def varlen_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Test whether `varlen_attn` runs here and aligns causality at the lower right, as fewer queries than keys need.

    Both depend on torch's version and the device, so it is compared once with SDPA and a mask.
    """
    if device.type != "cuda":
        return False
    segments = PairSegments([(5, 3, 4), (2, 6, 3)], 23, device)
    draw = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    query, key, value = (
        torch.randn(1, heads, 23, 64, device=device, dtype=dtype, generator=draw) for heads in (4, 2, 2)
    )
    try:
        found = _by_varlen(query, key, value, None, segments)
    except (ImportError, AttributeError, TypeError, RuntimeError, NotImplementedError):
        return False
    exact = _by_sdpa(query.float(), key.float(), value.float(), None, 0.0, segments)
    return bool((found.float() - exact).abs().max() < 0.05)


def register() -> None:
    """Make `NAME` known to transformers; doing so twice is harmless."""
    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def prefix_sharing_blocker(config: Any) -> str | None:
    """Say why a model of this transformers config cannot share prefixes; None if it can."""
    if config.model_type not in ARCHITECTURES:
        return f"prefix sharing is not tested on the architecture {config.model_type!r}"
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(config, "sliding_window", None)):
        return "the model has sliding-window layers"
    return None
