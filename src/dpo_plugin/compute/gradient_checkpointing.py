"""How many decoder layers have to be checkpointed: as few as memory allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MARGIN = 0.15
"""Share of the free memory that is left for the allocator's gaps, gradients and what other libraries take."""


def layers_to_checkpoint(layers: int, tokens: int, bytes_per_token: float, free: int) -> int:
    """Find the smallest number of checkpointed layers with which a step's activations fit.

    Args:
        layers: Decoder layers.
        tokens: Tokens of the longest forward.
        bytes_per_token: What a layer that is not checkpointed keeps for backward, in bytes per token.
        free: Free memory in bytes.
    """
    each = tokens * bytes_per_token
    budget = free * (1 - MARGIN) - each  # one layer is whole in memory while it is recomputed
    whole = max(0, int(budget // each))
    return max(0, layers - whole)


@contextmanager
def without_checkpointing(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Context in which no layer is checkpointed: a forward without gradients keeps nothing that could be recomputed.

    Reentrant checkpointing, which ZeRO-3 with PEFT needs, would also warn of it at each layer.

    Args:
        layers: The model's `GradientCheckpointingLayer`s.
    """
    switched = [layer for layer in layers if layer.gradient_checkpointing]
    for layer in switched:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in switched:
            layer.gradient_checkpointing = True  # type: ignore[assignment]


def saved_bytes_per_token(layer: nn.Module, config: Any, device: torch.device | str, tokens: int = 256) -> float | None:
    """Measure the bytes per token that a decoder layer saves for backward, by running it once without checkpointing.

    None where the layer cannot be run by itself: one that takes other arguments (Falcon), or rotary embeddings of part
    of the head (phi-2, StableLM, gpt-oss).

    Args:
        layer: A decoder layer, called as transformers calls Llama's.
        config: The model's transformers config.
        device: Where the layer is.
        tokens: Length of the row that is run.
    """
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point() and not p.requires_grad), torch.float32)
    hidden = torch.zeros(1, tokens, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cosine = torch.ones(1, tokens, head, device=device, dtype=dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = getattr(layer, "gradient_checkpointing", False)
    layer.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = layer(hidden, attention_mask=None, position_embeddings=(cosine, torch.zeros_like(cosine)))
        del output
    except Exception:  # of any kind: another library's layer, called in a way that it may not know
        return None
    finally:
        layer.gradient_checkpointing = before  # type: ignore[assignment]
    return sum(seen.values()) / tokens
