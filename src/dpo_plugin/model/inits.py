"""LoRA initialisations that change the base model, which policy and reference could then not share."""

from __future__ import annotations

from typing import Any

from dpo_plugin.errors import AdapterError, ConfigError

SUBTRACTED = ("pissa", "olora", "corda", "lora_ga")
"""Values (or how they begin) of ``init_lora_weights`` with which PEFT 0.20 subtracts the start, s·B₀A₀, from the base's
weights: each added adapter subtracts it again (tuners/lora/layer.py, ``update_layer``)."""


def check_saved_init(init: Any, key: str, path: Any) -> None:
    """Check how a saved adapter was initialised.

    PEFT's own ``from_pretrained`` initialises it again, which gives the trained model back only if that start is
    deterministic: ``pissa_niter_4`` came out 1.2 nats off on 14 tokens, CorDA is an error, LoRA-GA subtracts nothing.

    Args:
        init: ``init_lora_weights`` of its ``adapter_config.json``.
        key: The YAML key that named it.
        path: Its folder.

    Raises:
        AdapterError: If the base that it was trained on is not the one on disk.
    """
    if init == "loftq":
        raise AdapterError(
            f"`{key}: {path}` has init_lora_weights: loftq and was trained on a base that LoftQ had rounded. Merge it "
            "with PEFT: PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(<merged>). "
            "Write: base_model: <merged>, without lora_model_dir"
        )
    if str(init).lower().startswith(SUBTRACTED):
        raise AdapterError(
            f"`{key}: {path}` has init_lora_weights: {init}, and its start is to be subtracted from the base, once for "
            "each adapter. Convert it to plain LoRA with PEFT: model.save_pretrained(<plain>, path_initial_model_for_"
            f"weight_conversion=<the adapter before training>). Write: {key}: <plain>"
        )


def check_fresh_init(init: Any) -> None:
    """Check how a fresh LoRA is to be initialised.

    Raises:
        ConfigError: If the base would be changed, which is the reference.
    """
    if str(init).lower().startswith((*SUBTRACTED, "loftq")):
        key = "peft.loftq_config" if init == "loftq" else "peft_init_lora_weights"
        raise ConfigError(
            f"`{key}` asks for a fresh LoRA of kind {init}, which changes the base model, and the base "
            f"is its reference. Write: {key}: null"
        )
