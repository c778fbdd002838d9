"""`EngineSettings`: DDP, DeepSpeed or FSDP2 as a config asks for it, checked before weights are read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

from dpo_plugin.errors import ConfigError
from dpo_plugin.validation import AutoInteger, AutoReal, HostKeys, Integer, message

SHIPPED = "deepspeed_configs/zero3_bf16.json"
"""The ZeRO-3 settings that messages propose."""

WRITE_SHIPPED = f"`axolotl dpo recipes {SHIPPED} --copy .` writes ours here. Write: deepspeed: {SHIPPED}"
"""How they propose it: a checkout has the file, who installed the wheel has it after the command."""


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


@dataclass(frozen=True)
class EngineSettings:
    """How a run is spread over processes and what it multiplies in, read once from the raw config.

    Attributes:
        name: ``ddp`` (also of one process), ``zero0`` to ``zero3`` or ``fsdp2``.
        source: The YAML's ``deepspeed`` in messages: the JSON's path, or ``{…}``.
        deepspeed: The DeepSpeed settings, each key that is looked at in its type; empty without DeepSpeed.
        fsdp: ``fsdp_config`` without the keys' old prefix; empty without FSDP.
        world_size: Processes of the launch.
        dtype: The coarsest dtype that the run multiplies in.
    """

    name: str
    source: str
    deepspeed: Mapping[str, Any]
    fsdp: Mapping[str, Any]
    world_size: int
    dtype: torch.dtype

    @classmethod
    def read(cls, cfg: Mapping[str, Any]) -> EngineSettings:
        """Read ``deepspeed``, ``fsdp_config`` and the precision of a raw config.

        Raises:
            ConfigError: If both engines are asked for, FSDP is not version 2, or DeepSpeed's settings are unreadable.
        """
        setting, fsdp = cfg.get("deepspeed"), next((key for key in ("fsdp_config", "fsdp") if cfg.get(key)), None)
        if setting and fsdp:
            raise ConfigError(
                f"`deepspeed` and `{fsdp}` are both set, and only one of them can shard the model. Remove one. "
                f"Write: {fsdp}: null"
            )
        if fsdp and int(cfg.get("fsdp_version") or fsdp_keys(cfg).get("version") or 1) != 2:  # see yaml_keys.typed
            raise ConfigError(
                "`fsdp_config` without `fsdp_version: 2` is FSDP1, which flattens a layer into one tensor of one "
                "dtype: the fp32 policy that the optimizer updates cannot share it with a bf16 or 4-bit base (torch: "
                "`Must flatten tensors with uniform dtype`), and axolotl removed it in 0.20. "
                "Write: fsdp_version: 2, and fsdp_config as `axolotl dpo recipes qwen72b-dpo-fsdp` shows"
            )
        deepspeed = read_deepspeed(setting) if setting else {}
        stage = (deepspeed.get("zero_optimization") or {}).get("stage")
        return cls(
            name="fsdp2" if fsdp else f"zero{stage or 0}" if setting else "ddp",
            source=setting if isinstance(setting, str) else "{…}",
            deepspeed=deepspeed,
            fsdp=fsdp_keys(cfg),
            world_size=int(os.environ.get("WORLD_SIZE") or 1),
            dtype=coarsest_dtype(cfg),
        )

    @property
    def label(self) -> str:
        """The engine's name in messages."""
        return {"ddp": "DDP", "fsdp2": "FSDP"}.get(self.name, f"ZeRO-{self.name[-1]}")

    @property
    def zero(self) -> Mapping[str, Any]:
        """``zero_optimization``; empty without."""
        return self.deepspeed.get("zero_optimization") or {}

    @property
    def shards_parameters(self) -> bool:
        """Whether a rank holds only a part of each tensor."""
        return self.name in ("zero3", "fsdp2")

    @property
    def offloads(self) -> bool:
        """Whether ZeRO-3 or FSDP2 moves weights or optimizer states to the host."""
        return bool(self.fsdp.get("offload_params")) or (self.name == "zero3" and any(offloads(self.zero).values()))


def coarsest_dtype(cfg: Mapping[str, Any]) -> torch.dtype:
    """Find the dtype of coarsest resolution that a raw config multiplies in.

    axolotl 0.19 to 0.21 takes 16 bits where the machine can and the YAML does not say (utils/config/__init__.py,
    resolve_dtype). 8-bit weights round their inputs too, more than bf16 does in parts. TF32 has fp16's resolution.
    """
    bf16, fp16, tf32 = cfg.get("bf16", "auto"), cfg.get("fp16") or cfg.get("float16"), cfg.get("tf32", "auto")
    if bf16 == "auto":
        bf16 = not cfg.get("fp16") and is_torch_bf16_gpu_available()
        fp16 = fp16 or (not bf16 and cfg.get("fp16") is None)
    if bf16 or cfg.get("bfloat16") or cfg.get("load_in_8bit"):
        return torch.bfloat16
    if fp16 or (is_torch_tf32_available() if tf32 == "auto" else tf32):
        return torch.float16
    return torch.float32


def fsdp_keys(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Take the old prefix off the keys of ``fsdp_config``, as axolotl does."""
    return {key.removeprefix("fsdp_"): value for key, value in (cfg.get("fsdp_config") or {}).items()}


def check_parallel(cfg: Mapping[str, Any], engine: EngineSettings) -> None:
    """Check that a run's engine serves its rows, processes and base.

    Raises:
        ConfigError: Naming the key and the line to write.
    """
    for key in ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size"):
        if (cfg.get(key) or 1) > 1:
            raise ConfigError(
                f"`{key}: {cfg[key]}` splits rows or layers over GPUs, but log-probabilities need whole rows and whole "
                f"layers. Shard the model with deepspeed or fsdp_config instead. Write: {key}: 1"
            )
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if torch.cuda.is_available() and here > torch.cuda.device_count():
        raise ConfigError(
            f"{here} processes were launched on this machine, which has {torch.cuda.device_count()} GPUs. "
            f"Write: --nproc_per_node {torch.cuda.device_count()}"
        )
    _check_deepspeed(cfg, engine)
    check_fsdp(cfg, engine)


def check_fsdp(cfg: Mapping[str, Any], engine: EngineSettings) -> None:
    """Check that ``cpu_ram_efficient_loading`` is one that fills every rank.

    With 4 bits, axolotl 0.19 refuses it later on; 0.20 and 0.21 load NF4 in a way of their own, which is not tested.

    Raises:
        ConfigError: For what may leave ranks with weights that were never loaded.
    """
    if engine.fsdp.get("cpu_ram_efficient_loading") and not may_load_once(cfg):
        bits = ", ".join(f"`{key}: {bool(cfg.get(key))}`" for key in ("load_in_4bit", "load_in_8bit"))
        raise ConfigError(
            "`fsdp_config.cpu_ram_efficient_loading: true` is tested with `adapter: lora` on a base in 16 bits, and "
            f"this is `adapter: {cfg.get('adapter')}`, {bits}: ranks may be left with weights that were never loaded. "
            "Write: cpu_ram_efficient_loading: false"
        )


def may_load_once(cfg: Mapping[str, Any]) -> bool:
    """Whether ``cpu_ram_efficient_loading`` is tested with a config's adapter and base (tests/ranks)."""
    return cfg.get("adapter") == "lora" and not cfg.get("load_in_4bit") and not cfg.get("load_in_8bit")


def read_deepspeed(setting: Any) -> Mapping[str, Any]:
    """Read the DeepSpeed settings from a file, or as the YAML gives them.

    Raises:
        ConfigError: If the file is missing or holds no JSON object, or a key's value cannot be right, naming the key.
    """
    if isinstance(setting, Mapping):
        return setting
    file = Path(str(setting))
    if not file.is_file():
        raise ConfigError(f"`deepspeed: {setting}` does not exist. {WRITE_SHIPPED}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"`deepspeed: {setting}` is not valid JSON: {error}. {WRITE_SHIPPED}") from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"`deepspeed: {setting}` is a {type(found).__name__}, not a JSON object. {WRITE_SHIPPED}")
    try:
        return DeepSpeed.model_validate(found).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise ConfigError(f"`deepspeed: {setting}`: {message(error, DeepSpeed)}") from error


def offloads(zero: Mapping[str, Any]) -> dict[str, bool]:
    """Whether a ``zero_optimization`` moves parameters and optimizer states to the host."""
    keys = {"offload_parameters": "offload_param", "offload_optimizer": "offload_optimizer"}
    sections = {name: zero.get(key) or {} for name, key in keys.items()}
    return {name: (section.get("device") or "none") != "none" for name, section in sections.items()}


def _check_deepspeed(cfg: Mapping[str, Any], engine: EngineSettings) -> None:
    if engine.name == "zero3" and cfg.get("load_in_8bit"):
        raise ConfigError(
            "`load_in_8bit: true` cannot be partitioned by ZeRO-3: bitsandbytes keeps the scales of 8-bit weights "
            "outside of them. Write: load_in_4bit: true and adapter: qlora"
        )
    micro, steps = cfg.get("micro_batch_size"), cfg.get("gradient_accumulation_steps")
    expected = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "train_batch_size": int(micro) * int(steps) * engine.world_size if micro and steps else None,
    }
    for key, ours in expected.items():
        theirs = engine.deepspeed.get(key)
        if isinstance(theirs, int) and ours is not None and theirs != int(ours):
            raise ConfigError(
                f"`{key}: {theirs}` in `deepspeed: {engine.source}` contradicts the config, which says {ours}. "
                f'Write there: "{key}": "auto"'
            )
