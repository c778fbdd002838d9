"""What `axolotl dpo plan` tries on a config that does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_plugin.engines.config import EngineSettings, fsdp_keys
from dpo_plugin.plan import inputs

SHORTEST = 512
"""Least ``sequence_len`` that is proposed."""


def possible_changes(
    cfg: Mapping[str, Any], column: str, limit: str, engine: EngineSettings, requantised: bool
) -> Iterator[dict[str, Any]]:
    """List changes that may help, those first that leave results as they are; a shorter sequence is the last.

    Args:
        cfg: The config with what has been changed so far.
        column: The engine that is planned.
        limit: What does not fit: load, step or host.
        engine: The config's own.
        requantised: Whether the base has another precision than the config's already.
    """
    length, pairs = int(cfg.get("sequence_len") or 512), int(cfg.get("micro_batch_size") or 1)
    four, step, load = bool(cfg.get("load_in_4bit")), limit == "step", limit == "load"
    in_parts = {"dpo_plugin": {**(cfg.get("dpo_plugin") or {}), "loading": "sharded"}}
    is_in_parts, can_be = (inputs.loading({**cfg, **more}, column, engine).sharded for more in ({}, in_parts))
    whole, fsdp = load and four and not is_in_parts, fsdp_keys(cfg)
    fresh = {} if cfg.get("adapter") else {"lora_r": 16, "lora_alpha": 16, "lora_target_linear": True}
    eight = {"load_in_8bit": False} if cfg.get("load_in_8bit") else {}
    sharded = {"adapter": "lora", "load_in_4bit": False}  # zero.Init and FSDP2 shard it as it is read
    may_offload = column == "fsdp2" and not fsdp.get("offload_params") and (step or (load and not whole))
    narrow = {"optimizer": "adamw_torch_8bit" if column == "fsdp2" else "adamw_8bit"}
    four_bits = {"adapter": "qlora", "load_in_4bit": True, **eight, **fresh}
    changes: list[tuple[bool, dict[str, Any]]] = [
        (whole and can_be, in_parts),
        (whole and column != "fsdp2" and not cfg.get("embeddings_skip_upcast"), {"embeddings_skip_upcast": True}),
        (whole and column != "ddp" and not requantised, sharded),
        (step and not cfg.get("gradient_checkpointing"), {"gradient_checkpointing": True}),
        (may_offload, {"fsdp_config": {**fsdp, "offload_params": True}}),
        (step and pairs > 1, {"micro_batch_size": pairs // 2}),
        (step and _states_on_gpu(cfg, column), narrow),
        (limit != "host" and not four and not requantised, four_bits),
        (step and length // 2 >= SHORTEST, {"sequence_len": length // 2}),
    ]
    return (change for helps, change in changes if helps)


def _states_on_gpu(cfg: Mapping[str, Any], column: str) -> bool:
    """Whether AdamW's states are on the GPU in more than 8 bits; those of bitsandbytes and torchao are for GPUs alone.

    axolotl 0.19 to 0.21 takes torchao's with FSDP2 (utils/schemas/validation.py, check_fsdp2_w_8bit_optimizer).
    """
    name = str(cfg.get("optimizer") or "adamw")
    offloads = column == "zero3_offload" or (column == "fsdp2" and fsdp_keys(cfg).get("offload_params"))
    return "adamw" in name and "8bit" not in name and not offloads
