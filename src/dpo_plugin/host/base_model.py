"""What the config of the base model shows before its weights are read."""

from __future__ import annotations

import os
from typing import Any

from axolotl.loaders.utils import load_model_config

from dpo_plugin.compute.attention import prefix_sharing_blocker
from dpo_plugin.errors import ConfigError
from dpo_plugin.host.log import LOG
from dpo_plugin.host.settings import RunSettings
from dpo_plugin.model.target_parameters import check_expert_count

DEQUANTIZE = "model_quantization_config: Mxfp4Config, model_quantization_config_kwargs: {dequantize: true}"


def check_base(cfg: Any, settings: RunSettings) -> None:
    """Refuse what cannot be trained on a base model, and say once that one which sees gets no images.

    Args:
        cfg: The host's config after its validation.
        settings: Of the run.

    Raises:
        AdapterError: For an adapter on another number of experts.
        ConfigError: For a base in MXFP4 that is not dequantised, and for ``prefix_sharing: true`` on one whose layers
            hand on a state.
    """
    config = load_model_config(cfg)
    _check_quantisation(cfg, config)
    for adapter in filter(None, (settings.policy, settings.reference.adapter)):
        check_expert_count(adapter.config, adapter.key, adapter.path, config)
    why = prefix_sharing_blocker(config)
    if why and settings.config.compute.prefix_sharing is True:
        raise ConfigError(f"{why}, but `dpo_plugin.compute.prefix_sharing: true` asks for it. Write: auto")
    if cfg.is_multimodal and os.environ.get("RANK", "0") == "0":
        LOG.info(
            f"dpo_plugin: the base model ({config.model_type}) is trained on text alone: no images are used, and its "
            "parts that see stay as they are"
        )


def _check_quantisation(cfg: Any, config: Any) -> None:
    """Refuse weights that stay packed in MXFP4: transformers 5.16 to 5.20 has no backward for them.

    Its quantizer says so (quantizers/quantizer_mxfp4.py, ``is_trainable``), after the weights are read.
    """
    found = getattr(config, "quantization_config", None) or {}
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    if method != "mxfp4":
        return
    if cfg.load_in_4bit or cfg.load_in_8bit:
        key = "load_in_4bit" if cfg.load_in_4bit else "load_in_8bit"
        raise ConfigError(
            f"`{key}: true` cannot quantise `base_model: {cfg.base_model}`, whose experts are in MXFP4 already. "
            f"Write: adapter: lora, {key}: false, {DEQUANTIZE}"
        )
    if cfg.model_quantization_config != "Mxfp4Config" or not (cfg.model_quantization_config_kwargs or {}).get(
        "dequantize"
    ):
        raise ConfigError(
            f"the experts of `base_model: {cfg.base_model}` are in MXFP4, which has no backward and cannot carry LoRA. "
            f"Write: {DEQUANTIZE}"
        )
