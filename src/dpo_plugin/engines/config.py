"""Settings of DeepSpeed and FSDP that contradict each other or the config, found before weights are read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError

from dpo_plugin.errors import ConfigError
from dpo_plugin.validation import AutoInteger, AutoReal, HostKeys, Integer, message

SHIPPED = "deepspeed_configs/zero3_bf16.json"
"""The ZeRO-3 settings that messages propose."""


class ZeroOptimization(HostKeys):
    """``zero_optimization`` of a DeepSpeed config."""

    stage: Integer | None = Field(None, examples=[3])
    offload_param: dict[str, Any] | None = Field(None, examples=[{"device": "none"}])
    offload_optimizer: dict[str, Any] | None = Field(None, examples=[{"device": "none"}])
    reduce_bucket_size: AutoReal = Field(None, examples=["auto"])
    stage3_prefetch_bucket_size: AutoReal = Field(None, examples=["auto"])
    stage3_param_persistence_threshold: AutoReal = Field(None, examples=["auto"])
    stage3_max_live_parameters: AutoReal = Field(None, examples=["auto"])
    stage3_max_reuse_distance: AutoReal = Field(None, examples=["auto"])
    sub_group_size: AutoReal = Field(None, examples=["auto"])


class DeepSpeed(HostKeys):
    """A DeepSpeed config, in the YAML or in a JSON file."""

    zero_optimization: ZeroOptimization | None = Field(None, examples=[{"stage": 3}])
    train_micro_batch_size_per_gpu: AutoInteger = Field(None, examples=["auto"])
    gradient_accumulation_steps: AutoInteger = Field(None, examples=["auto"])
    train_batch_size: AutoInteger = Field(None, examples=["auto"])
    bf16: dict[str, Any] | None = Field(None, examples=[{"enabled": True}])
    fp16: dict[str, Any] | None = Field(None, examples=[{"enabled": False}])


def check_parallel(cfg: Mapping[str, Any]) -> None:
    """Check the raw config's ``deepspeed``, ``fsdp_config`` and number of processes.

    Raises:
        ConfigError: Naming the key and the line to write.
    """
    _check_rows_are_whole(cfg)
    check_one_engine(cfg)
    _check_devices()
    if cfg.get("deepspeed"):
        _check_deepspeed(cfg, read_deepspeed(cfg["deepspeed"]))
    if cfg.get("fsdp_config") or cfg.get("fsdp"):
        check_fsdp(cfg)


def _check_rows_are_whole(cfg: Mapping[str, Any]) -> None:
    for key in ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size"):
        if (cfg.get(key) or 1) > 1:
            raise ConfigError(
                f"`{key}: {cfg[key]}` splits rows or layers over GPUs, but log-probabilities need whole rows and whole "
                f"layers. Shard the model with deepspeed or fsdp_config instead. Write: {key}: 1"
            )


def check_one_engine(cfg: Mapping[str, Any]) -> None:
    """Check that not both of DeepSpeed and FSDP are asked for.

    Raises:
        ConfigError: If they are.
    """
    fsdp = next((key for key in ("fsdp_config", "fsdp") if cfg.get(key)), None)
    if cfg.get("deepspeed") and fsdp:
        raise ConfigError(
            f"`deepspeed` and `{fsdp}` are both set, and only one of them can shard the model. Remove one. "
            f"Write: {fsdp}: null"
        )


def engine_that_shards(cfg: Mapping[str, Any]) -> str | None:
    """FSDP or ZeRO-3 where a rank holds a part of each tensor, else None."""
    if cfg.get("fsdp_config") or cfg.get("fsdp"):
        return "FSDP"
    settings = read_deepspeed(cfg["deepspeed"]) if cfg.get("deepspeed") else {}
    return "ZeRO-3" if (settings.get("zero_optimization") or {}).get("stage") == 3 else None


def fsdp_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """``fsdp_config`` with its keys' old prefix taken off, as axolotl does."""
    return {key.removeprefix("fsdp_"): value for key, value in (cfg.get("fsdp_config") or {}).items()}


def fsdp_version(cfg: Mapping[str, Any]) -> int:
    """1 or 2, from wherever axolotl reads it; its default is 1 (utils/schemas/validation.py:1216)."""
    return int(cfg.get("fsdp_version") or fsdp_config(cfg).get("version") or 1)


def check_fsdp(cfg: Mapping[str, Any]) -> None:
    """Check the combination of FSDP's settings.

    Raises:
        ConfigError: For FSDP1, and for what axolotl refuses later on.
    """
    if fsdp_version(cfg) != 2:
        raise ConfigError(
            "`fsdp_config` without `fsdp_version: 2` is FSDP1, which flattens a layer into one tensor of one dtype: "
            "the fp32 policy that the optimizer updates cannot stand beside a bf16 or 4-bit base (torch: `Must flatten "
            "tensors with uniform dtype`), and axolotl 0.19 has deprecated it. "
            "Write: fsdp_version: 2, and fsdp_config as in recipes/qwen72b-dpo-fsdp.yaml"
        )
    if not fsdp_config(cfg).get("cpu_ram_efficient_loading"):
        return
    if cfg.get("load_in_4bit"):
        raise ConfigError(
            "`fsdp_config.cpu_ram_efficient_loading: true` is refused by axolotl with load_in_4bit: one rank would "
            "quantise what the others hold in full. Write: cpu_ram_efficient_loading: false"
        )
    if not may_load_once(cfg):
        raise ConfigError(
            "`fsdp_config.cpu_ram_efficient_loading: true` is tested with `adapter: lora` on a base in 16 bits, and "
            f"this is `adapter: {cfg.get('adapter')}`, `load_in_8bit: {bool(cfg.get('load_in_8bit'))}`: ranks may be "
            "left with weights that were never loaded. Write: cpu_ram_efficient_loading: false"
        )


def may_load_once(cfg: Mapping[str, Any]) -> bool:
    """Whether ``cpu_ram_efficient_loading`` is tested with a config's adapter and base (tests/ranks)."""
    return cfg.get("adapter") == "lora" and not cfg.get("load_in_4bit") and not cfg.get("load_in_8bit")


def read_deepspeed(setting: Any) -> Mapping[str, Any]:
    """The DeepSpeed settings, from a file or as they stand in the YAML.

    Raises:
        ConfigError: If the file is missing or is no JSON object.
    """
    if isinstance(setting, Mapping):
        return setting
    file = Path(str(setting))
    if not file.is_file():
        raise ConfigError(f"`deepspeed: {setting}` does not exist. Write: deepspeed: {SHIPPED}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"`deepspeed: {setting}` is no JSON: {error}. Write: deepspeed: {SHIPPED}") from error
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"`deepspeed: {setting}` is a {type(found).__name__}, not a JSON object. Write: deepspeed: {SHIPPED}"
        )
    return typed_deepspeed(found, str(setting))


def typed_deepspeed(found: Mapping[str, Any], file: str) -> dict[str, Any]:
    """A DeepSpeed config with every key that we look at in its type.

    Raises:
        ConfigError: Naming the file and the first key whose value cannot be what it means.
    """
    try:
        return DeepSpeed.model_validate(found).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise ConfigError(f"`deepspeed: {file}`: {message(error, DeepSpeed)}") from error


def offloads_to_host(cfg: Mapping[str, Any]) -> bool:
    """Whether ZeRO-3 or FSDP2 is asked to move weights or optimizer states to the host."""
    if not cfg.get("deepspeed"):
        return bool(fsdp_config(cfg).get("offload_params"))
    zero = read_deepspeed(cfg["deepspeed"]).get("zero_optimization")
    return isinstance(zero, Mapping) and zero.get("stage") == 3 and any(offloads(zero).values())


def offloads(zero: Mapping[str, Any]) -> dict[str, bool]:
    """Whether a ``zero_optimization`` moves parameters and optimizer states to the host."""
    keys = {"offload_parameters": "offload_param", "offload_optimizer": "offload_optimizer"}
    sections = {name: zero.get(key) or {} for name, key in keys.items()}
    return {name: (section.get("device") or "none") != "none" for name, section in sections.items()}


def _check_devices() -> None:
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if torch.cuda.is_available() and here > torch.cuda.device_count():
        raise ConfigError(
            f"{here} processes were launched on this machine, which has {torch.cuda.device_count()} GPUs. "
            f"Write: --nproc_per_node {torch.cuda.device_count()}"
        )


def _check_deepspeed(cfg: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    stage = (settings.get("zero_optimization") or {}).get("stage")
    if stage == 3 and cfg.get("load_in_8bit"):
        raise ConfigError(
            "`load_in_8bit: true` cannot be partitioned by ZeRO-3: bitsandbytes keeps the scales of 8-bit weights "
            "beside them. Write: load_in_4bit: true and adapter: qlora"
        )
    micro, steps = cfg.get("micro_batch_size"), cfg.get("gradient_accumulation_steps")
    world = int(os.environ.get("WORLD_SIZE") or 1)
    product = int(micro) * int(steps) * world if micro and steps else None
    expected = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "train_batch_size": product,
    }
    for key, ours in expected.items():
        theirs = settings.get(key)
        if isinstance(theirs, int) and ours is not None and theirs != int(ours):
            raise ConfigError(
                f"`{key}: {theirs}` in `deepspeed: {cfg['deepspeed'] if isinstance(cfg['deepspeed'], str) else '{…}'}` "
                f'contradicts the config, which says {ours}. Write there: "{key}": "auto"'
            )
