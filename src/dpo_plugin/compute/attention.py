"""Attention of the flat layout: chosen and rejected each see their pair's shared prefix and themselves, nothing else.

It is registered with transformers' `AttentionInterface` under `NAME`; no model class is patched. The segments travel
as the keyword argument ``pair_segments`` through the model's forward, and through the recompute of gradient
checkpointing, to `shared_prefix_attention`. Without that argument it is plain SDPA with SDPA's masks, so evaluation by
generation keeps working. Sharing a prefix within one row: arXiv 2410.20305.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

NAME = "dpo_plugin_shared_prefix"
"""Where a model attends by SDPA."""

EAGER = "dpo_plugin_shared_prefix_eager"
"""Where it attends by the function of its own file: with sinks (gpt-oss), with soft-capped scores, or by choice."""

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
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def mask(self, queries: int, keys: int, window: int | None) -> Tensor:
        """Mask the last tokens of a row, (queries, keys) bool: each sees itself and what came before it.

        Args:
            queries: How many of them.
            keys: Tokens of the row; a token's place in it is its position.
            window: How many of them the layer lets a token see, itself included; None for all.
        """
        key = (queries, keys, window)
        if key not in self._masks:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=self.device).tril(keys - queries)
            self._masks[key] = mask if window is None else mask.triu(keys - queries - window + 1)
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


_makes_masks = True


@contextmanager
def without_masks() -> Iterator[None]:
    """Context of the forward of a flat row, whose masks `PairSegments` makes, a pair's at a time."""
    global _makes_masks
    _makes_masks = False
    try:
        yield
    finally:
        _makes_masks = True


def _mask_of_rows(make: Callable[..., Tensor | None], *args: Any, **kwargs: Any) -> Tensor | None:
    return make(*args, **kwargs) if _makes_masks else None


_calls: list[Tensor | int | None] | None = None


@contextmanager
def recorded_calls() -> Iterator[list[Any]]:
    """Context that records each layer's mask in two rows, and its window in a flat row."""
    global _calls
    before, calls = _calls, list[Any]()
    _calls = calls
    try:
        yield calls
    finally:
        _calls = before


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    pair_segments: PairSegments | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers calls it: (1, heads, length, head) in, (1, length, heads, head) out."""
    if _calls is not None:
        _calls.append(attention_mask if pair_segments is None else sliding_window)
    if pair_segments is None:
        plain = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return plain[0], None
    if dropout == 0.0 and varlen_works(query.device, query.dtype, query.shape[-1], value.shape[-1]):
        return _by_varlen(query, key, value, scaling, sliding_window, pair_segments), None
    return _by_sdpa(query, key, value, scaling, dropout, sliding_window, pair_segments), None


def eager_shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    pair_segments: PairSegments | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by the function in the file of the layer's class, with a mask for each part of a flat row."""
    own = sys.modules[type(module).__module__].eager_attention_forward
    if _calls is not None:
        _calls.append(attention_mask if pair_segments is None else sliding_window)
    if pair_segments is None:
        return own(module, query, key, value, attention_mask, **kwargs)[0], None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = pair_segments.mask(query.shape[2], key.shape[2], sliding_window)
        hidden = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        out: Tensor = own(module, query, key, value, hidden[None, None], **kwargs)[0]
        return out

    return _pair_by_pair(query, key, value, pair_segments, attend), None


def _pair_by_pair(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: PairSegments,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    parts, start = [], 0
    for prefix, chosen, rejected in segments.lengths:
        middle, end = start + prefix + chosen, start + prefix + chosen + rejected
        parts.append(attend(*(x[:, :, start:middle] for x in (query, key, value))))
        k, v = (torch.cat([x[:, :, start : start + prefix], x[:, :, middle:end]], 2) for x in (key, value))
        parts.append(attend(query[:, :, middle:end], k, v))
        start = end
    if segments.padding:
        parts.append(torch.zeros_like(parts[0][:, :1]).expand(-1, segments.padding, -1, -1))
    return torch.cat(parts, 1)


def _by_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    segments: PairSegments,
) -> Tensor:
    if query.device.type != "cpu":  # with a mask, other kernels than the CPU's do not group heads
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    settings: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries, keys = query.shape[2], key.shape[2]
        plain = queries == keys and (window is None or keys <= window)
        mask = None if plain else segments.mask(queries, keys, window)
        return scaled_dot_product_attention(query, key, value, mask, is_causal=plain, **settings).transpose(1, 2)

    return _pair_by_pair(query, key, value, segments, attend)


def _by_varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, segments: PairSegments
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    index, ends_q, ends_k, longest_q, longest_k = segments.varlen
    tokens = query.shape[2] - segments.padding
    queries = query[0, :, :tokens].transpose(0, 1).contiguous()
    keys, values = (x[0].transpose(0, 1)[index] for x in (key, value))
    settings: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0), "scale": scaling}
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
def varlen_works(device: torch.device, dtype: torch.dtype, head: int, value_head: int) -> bool:
    """Test whether `varlen_attn` runs here and aligns causality at the lower right, as fewer queries than keys need.

    That depends on torch's version, the device and the size of a head, so it is compared once with SDPA and a mask,
    with a window and without.
    """
    if device.type != "cuda" or dtype not in _VARLEN_DTYPES or head != value_head:
        return False
    segments = PairSegments([(5, 3, 4), (2, 6, 3)], 23, device)
    draw = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    query, key, value = (
        torch.randn(1, heads, 23, head, device=device, dtype=dtype, generator=draw) for heads in (4, 2, 2)
    )
    wide = [x.float() for x in (query, key, value)]
    try:
        found = [_by_varlen(query, key, value, None, window, segments) for window in (None, 4)]
    except (ImportError, AttributeError, TypeError, RuntimeError, NotImplementedError):
        return False
    exact = [_by_sdpa(wide[0], wide[1], wide[2], None, 0.0, window, segments) for window in (None, 4)]
    return all(bool((a.float() - b).abs().max() < 0.05) for a, b in zip(found, exact, strict=True))


def attend_to_pairs(model: Any) -> None:
    """Let a model attend in flat rows, too; doing so twice is harmless."""
    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionMaskInterface.register(NAME, partial(_mask_of_rows, sdpa_mask))
    AttentionInterface.register(EAGER, eager_shared_prefix_attention)
    AttentionMaskInterface.register(EAGER, partial(_mask_of_rows, eager_mask))
    eager = model.config._attn_implementation in ("eager", EAGER)
    model.set_attn_implementation(EAGER if eager else NAME)


def attend_to_rows(model: Any) -> None:
    """Let a model attend as it did before `attend_to_pairs`."""
    now = model.config._attn_implementation
    model.set_attn_implementation({NAME: "sdpa", EAGER: "eager"}.get(now, now))


LAYERS_WITH_STATE = ("mamba", "ssm", "linear_attention", "conv", "recurrent", "rwkv", "lightning")
"""In the names that configs give to kinds of layers: such a layer hands on a state from token to token."""


def prefix_sharing_blocker(config: Any) -> str | None:
    """Say why a model of this transformers config must not even try a flat row; None if it may.

    What comes of trying is compared with two rows by `dpo_plugin.compute.layouts`.
    """
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    layers = [str(layer) for layer in getattr(config.get_text_config(), "layer_types", None) or ()]
    state = next((layer for layer in layers if any(name in layer for name in LAYERS_WITH_STATE)), None)
    if state or getattr(kind, "_is_stateful", False):
        return f"layers of the model ({state or config.model_type}) hand on a state from one pair to the next"
    if kind and not kind._can_set_attn_implementation():
        return f"transformers' {config.model_type} does not let its attention be replaced"
    return None
