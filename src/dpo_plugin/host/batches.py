"""What the trainer sets up once for its steps: the layout of batches, and how many layers are checkpointed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_plugin.compute import attention
from dpo_plugin.compute.batching import PairCollator, row_name
from dpo_plugin.compute.checkpointing import layers_to_checkpoint, saved_bytes_per_token
from dpo_plugin.compute.logps import PLAIN_LM_HEADS
from dpo_plugin.errors import ConfigError
from dpo_plugin.host.log import LOG
from dpo_plugin.host.settings import RunSettings


def shares_prefixes(settings: RunSettings, base: Any) -> bool:
    """Whether batches are flat; says so once where they are not.

    Raises:
        ConfigError: With ``prefix_sharing: true`` on a model that cannot.
    """
    why = settings.prefix_sharing_blocker or attention.prefix_sharing_blocker(base.config)
    if why is None:
        return True
    if settings.config.compute.prefix_sharing is True:
        raise ConfigError(f"{why}, but `dpo_plugin.compute.prefix_sharing: true` asks for it. Write: auto")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        LOG.info(f"dpo_plugin: chosen and rejected are computed as two rows each, because {why}")
    return False


def prepare_models(flat: bool, *models: Any) -> None:
    """Set the attention of the flat layout, and say where the head cannot score tokens itself."""
    for model in models:
        if model is None:
            continue
        keep_nf4_as_packed(model)
        if flat:
            attention.register()
            model.set_attn_implementation(attention.NAME)
        if model.config.model_type not in PLAIN_LM_HEADS:
            LOG.info(
                f"dpo_plugin: {model.config.model_type!r} is not among the architectures whose head scores tokens in "
                "chunks, so the logits of all completion tokens are held at once"
            )


def keep_nf4_as_packed(model: nn.Module) -> None:
    """Let an evaluation leave 4-bit weights as training needs them.

    On CPUs with AVX512-BF16, bitsandbytes 0.50.2 packs them anew for inference (nn/modules.py:613), and the next
    training step fails: "a view of a leaf Variable that requires grad is being used in an in-place operation".
    tests/integration/test_compute_runs.py evaluates a 4-bit run between its steps.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def make_collator(settings: RunSettings, kwargs: dict[str, Any], flat: bool) -> PairCollator:
    """Our collator, which keeps sources and row keys, in place of TRL's or of the host's.

    The host's, for ``pad_to_multiple_of``, looks for ``*_input_ids``, which TRL 1.9 no longer makes
    (axolotl 0.19, utils/collators/dpo.py); tests/integration/test_data_runs.py holds the key.
    """
    multiple = getattr(kwargs.get("data_collator"), "pad_to_multiple_of", None) or kwargs["args"].pad_to_multiple_of
    pad = kwargs["processing_class"].pad_token_id
    return PairCollator(pad, multiple, flat, settings.config.compute.max_tokens)


def check_lengths(collator: PairCollator, datasets: Any) -> None:
    """Raise if a pair of the data is longer than ``compute.max_tokens``.

    Raises:
        DataError: Naming the row.
    """
    if collator.max_tokens is None:
        return
    for name, data in datasets:
        for number, row in enumerate(data):
            collator.check_fits(row, f"{row_name(row, number)} of the {name} data")


def named_datasets(trainer: Any) -> Iterator[tuple[str, Any]]:
    """The trainer's data sets with a name for messages."""
    if trainer.train_dataset is not None:
        yield "training", trainer.train_dataset
    evaluation = trainer.eval_dataset
    if isinstance(evaluation, dict):
        yield from ((f"evaluation ({name})", data) for name, data in evaluation.items())
    elif evaluation is not None:
        yield "evaluation", evaluation


class CheckpointLayers(TrainerCallback):  # type: ignore[misc]
    """Checkpoints as many decoder layers as ``compute.checkpoint_layers`` says, before the first step.

    Args:
        trainer: The `PreferenceTrainer`.
        wanted: Number of layers, or "auto".
    """

    def __init__(self, trainer: Any, wanted: int | str):
        self.trainer = trainer
        self.wanted = wanted

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Switch checkpointing off on the last layers, which are the first to be run backwards."""
        layers = [m for m in self.trainer.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        count = self._auto(layers) if self.wanted == "auto" else min(int(self.wanted), len(layers))
        if count is None:
            kind = type(layers[0]).__name__ if layers else "model"
            LOG.info(
                f"dpo_plugin: all layers are checkpointed; what a {kind} keeps or the free memory is not known here"
            )
            return
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = number < count
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
        return layers_to_checkpoint(
            layers=len(layers),
            tokens=self._longest(),
            bytes_per_token=per_token,
            free=free - states,
        )

    def _longest(self) -> int:
        data = self.trainer.train_dataset
        collator: PairCollator = self.trainer.data_collator
        longest: int = max(collator.tokens([row]) for row in data)
        most = longest * int(self.trainer.args.per_device_train_batch_size)
        return min(most, collator.max_tokens or most)
