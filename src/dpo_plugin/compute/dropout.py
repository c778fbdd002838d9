"""Randomness of a model's config that is not a dropout module."""

from __future__ import annotations

from torch import nn

NOISE = ("input_jitter_noise", "jitter_noise", "moe_jitter_eps")
"""Attributes by which routers of mixtures of experts multiply their inputs with noise in training (Mixtral, DBRX)."""

READ_FROM_CONFIG = ("blt", "falcon", "gpt_neo", "gptj", "persimmon")
"""Model types of transformers 5.16 whose forwards read a dropout from the config itself, some in Flash Attention."""


def disable_dropout(*models: nn.Module | None) -> None:
    """Set to 0 the dropout and noise that models' modules draw in training.

    ``disable_dropout`` of TRL 1.9 to 1.14 takes ``nn.Dropout`` alone (trl/trainer/utils.py:185). Attention, however,
    gets ``attention_dropout`` of the config as a number (0.1 in Hunyuan and Seed-OSS), so policy and reference would
    not see the same network. The config is left as it is, for it is saved with a full fine-tune, except where it is
    what the forward reads.
    """
    for model in filter(None, models):
        for module in model.modules():
            for name, value in vars(module).items():
                if isinstance(value, float) and ("drop" in name or name in NOISE):
                    setattr(module, name, 0.0)
        config = getattr(model, "config", None)
        if getattr(config, "model_type", None) in READ_FROM_CONFIG:
            for name in [name for name in vars(config) if "drop" in name and getattr(config, name)]:
                setattr(config, name, 0.0)
