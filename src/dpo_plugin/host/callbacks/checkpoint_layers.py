"""Checkpoints as many layers as the config says, or as memory requires."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from dpo_plugin.compute.gradient_checkpointing import layers_to_checkpoint, saved_bytes_per_token
from dpo_plugin.host.batches import checkpointed_layers
from dpo_plugin.host.callbacks import RunningTrainer
from dpo_plugin.host.log import LOG


class CheckpointLayers(TrainerCallback):  # type: ignore[misc]
    """Checkpoints as many decoder layers as ``compute.checkpoint_layers`` says, before the first step."""

    def __init__(self, trainer: RunningTrainer, wanted: int | str):
        self.trainer = trainer
        self.wanted = wanted

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Switch checkpointing off on the last layers, which are the first to be run backwards."""
        layers = checkpointed_layers(self.trainer.model)
        count = self._auto(layers) if self.wanted == "auto" else min(int(self.wanted), len(layers))
        if count is None:
            kind = type(layers[0]).__name__ if layers else "model"
            LOG.info(
                f"dpo_plugin: all layers are checkpointed; what a {kind} keeps or the free memory is not known here"
            )
            return
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = number < count  # type: ignore[assignment]
        LOG.info(f"dpo_plugin: {count} of {len(layers)} layers are checkpointed")

    def _auto(self, layers: list[nn.Module]) -> int | None:
        trainer = self.trainer
        device = trainer.accelerator.device
        whole = all(p.numel() and not hasattr(p, "device_mesh") for p in trainer.model.parameters())
        if device.type != "cuda" or not whole or not layers:
            return None
        per_token = saved_bytes_per_token(layers[-1], trainer.model.config, device)
        if per_token is None:
            return None
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        states = 3 * 4 * trained  # the gradient and AdamW's two moments in fp32
        collator = trainer.data_collator
        most = max(collator.tokens([row]) for row in trainer.train_dataset) * trainer.args.per_device_train_batch_size
        longest_forward = min(most, collator.max_tokens or most)  # tokens
        return layers_to_checkpoint(len(layers), longest_forward, per_token, free - states)
