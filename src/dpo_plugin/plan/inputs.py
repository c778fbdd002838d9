"""What a config says about memory: its engine, adapters, precision and longest step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig

from dpo_plugin.compute import attention
from dpo_plugin.config import ComputeConfig, ReferenceConfig
from dpo_plugin.engines.config import WRITE_SHIPPED, EngineSettings, check_fsdp, fsdp_keys, offloads
from dpo_plugin.engines.loading import Loading
from dpo_plugin.errors import ConfigError
from dpo_plugin.model.adapters import POLICY, REFERENCE
from dpo_plugin.model.references import ReferenceStrategy, strategy_name
from dpo_plugin.plan.activations import Step
from dpo_plugin.plan.engines import PlanInput, Zero3
from dpo_plugin.registry import get_registry

SHIPPED_ZERO3 = Zero3(persistence=1_048_576, prefetch=104_857_600, bucket=104_857_600)
"""The settings of `SHIPPED`, for a config that names no ZeRO-3 of its own."""


def check(cfg: Mapping[str, Any], path: str) -> None:
    """Check what the YAML alone shows, before its engine's settings are read.

    Raises:
        ConfigError: If the run cannot be.
    """
    adapter, four, eight = cfg.get("adapter"), bool(cfg.get("load_in_4bit")), bool(cfg.get("load_in_8bit"))
    if cfg.get("rl") not in ("dpo", "ipo"):
        raise ConfigError(f"`rl: {cfg.get('rl')}` in {path} is not what dpo_plugin trains. Write: rl: dpo")
    if adapter in (None, "lora", "qlora") and ((adapter == "qlora") != four or (eight and adapter != "lora")):
        raise ConfigError(
            f"`load_in_4bit: {four}` and `load_in_8bit: {eight}` do not go with `adapter: {adapter}`: axolotl takes "
            "4 bits for qlora alone and 8 for lora alone. Write: adapter: qlora, load_in_4bit: true"
        )
    engines = [key for key in ("deepspeed", "fsdp_config", "fsdp") if cfg.get(key)]
    if len(engines) == 1 and eight:
        raise ConfigError(
            f"`{engines[0]}` does not partition the int8 weights of `load_in_8bit: true`. "
            "Write: adapter: qlora, load_in_4bit: true, load_in_8bit: false"
        )


def planned_engine(cfg: Mapping[str, Any], engine: EngineSettings) -> str:
    """Name the column of the plan that is the config's own engine.

    Raises:
        ConfigError: If the engine is one that is not planned.
    """
    check_fsdp(cfg, engine)
    if engine.name == "zero3":
        return "zero3_offload" if engine.offloads else "zero3"
    if engine.name.startswith("zero"):
        stage = engine.zero.get("stage")
        raise ConfigError(f"`deepspeed: {engine.source}` is of stage {stage}; 3 is planned. {WRITE_SHIPPED}")
    return engine.name


def zero3_settings(engine: EngineSettings, column: str, hidden: int, width: int) -> Zero3:
    """Collect ZeRO-3's settings: the JSON's, with transformers' values for "auto"; without one, those of `SHIPPED`."""
    offload = dict.fromkeys(("offload_parameters", "offload_optimizer"), column == "zero3_offload")
    if not engine.deepspeed:
        return replace(SHIPPED_ZERO3, width=width, **offload)
    if column == "zero3_offload" and engine.offloads:
        offload = offloads(engine.zero)
    keys = {
        "bucket": ("reduce_bucket_size", hidden**2),
        "prefetch": ("stage3_prefetch_bucket_size", int(0.9 * hidden**2)),
        "persistence": ("stage3_param_persistence_threshold", 10 * hidden),
        "live": ("stage3_max_live_parameters", 10**9),
        "reuse": ("stage3_max_reuse_distance", 10**9),
        "sub_group": ("sub_group_size", 10**9),
    }
    given = {name: (engine.zero.get(key), auto) for name, (key, auto) in keys.items()}
    numbers: dict[str, Any] = {n: auto if v == "auto" else int(v) for n, (v, auto) in given.items() if v is not None}
    enabled = [(engine.deepspeed.get(kind) or {}).get("enabled") for kind in ("bf16", "fp16")]
    narrow = True in enabled or ("auto" in enabled and width == 2)
    return Zero3(width=2 if narrow else 4, **numbers, **offload)


def half(cfg: Mapping[str, Any]) -> bool:
    """Whether the base model is loaded in 16 bits, as axolotl's resolve_dtype decides; ``auto`` is a GPU that can."""
    return any(cfg.get(key) for key in ("bf16", "bfloat16", "fp16", "float16", "load_in_8bit"))


def in_bf16(cfg: Mapping[str, Any]) -> bool:
    """Whether those 16 bits are bf16."""
    return bool(cfg.get("bf16") or cfg.get("bfloat16"))


def model_config(cfg: Mapping[str, Any]) -> Any:
    """Load the base model's transformers config.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    base = str(cfg.get("base_model_config") or cfg.get("base_model") or "")
    folder = Path(base).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"`base_model: {base}` holds no config.json. Write: base_model: <folder of a model>")
    settings = {"trust_remote_code": bool(cfg.get("trust_remote_code")), "revision": cfg.get("revision_of_model")}
    try:
        return AutoConfig.from_pretrained(folder if folder.is_dir() else base, **settings)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"`base_model: {base}` is no folder with a config.json that can be read, and neither the hub nor its cache "
            f"gave one ({reason}). Write: base_model: <folder with config.json>"
        ) from error


def reference_strategy(cfg: Mapping[str, Any], reference: ReferenceConfig) -> type[ReferenceStrategy]:
    """Look up the strategy that a config asks for; an unknown one is an error."""
    name = strategy_name(cfg, reference)
    strategy: type[ReferenceStrategy] = get_registry().reference_strategies.find(name, "dpo_plugin.reference.strategy")
    return strategy


def adapter_configs(cfg: Mapping[str, Any], reference: ReferenceConfig) -> dict[str, LoraConfig]:
    """Collect LoRA settings of policy and reference: the adapter folders' where they exist, else the YAML's.

    Raises:
        ConfigError: If neither tells them, or the reference strategy is unknown.
    """
    strategy = reference_strategy(cfg, reference)
    if not cfg.get("adapter"):
        return {}
    policy = _lora(cfg, cfg.get("lora_model_dir"))
    if not strategy.needs_adapter:
        return {POLICY: policy}
    return {POLICY: policy, REFERENCE: _lora(cfg, reference.adapter_dir) if reference.adapter_dir else policy}


def _lora(cfg: Mapping[str, Any], folder: Any) -> LoraConfig:
    if folder and (Path(folder) / "adapter_config.json").is_file():
        found = LoraConfig.from_pretrained(str(folder))
        found.inference_mode = False
        return found
    targets = "all-linear" if cfg.get("lora_target_linear") else cfg.get("lora_target_modules")
    parameters = cfg.get("lora_target_parameters") or None
    for key, value in (("lora_r", cfg.get("lora_r")), ("lora_target_modules", targets or parameters)):
        if not value:
            where = f", and `{folder}` has no adapter_config.json that tells it" if folder else ""
            raise ConfigError(f"`{key}` is missing{where}. Write: lora_r: 16 and lora_target_linear: true")
    saved = cfg.get("lora_modules_to_save") or None
    return LoraConfig(
        r=int(cfg["lora_r"]),
        target_modules=targets or [],
        target_parameters=parameters,
        modules_to_save=saved,
        task_type="CAUSAL_LM",
    )


def loading(cfg: Mapping[str, Any], column: str, engine: EngineSettings) -> Loading:
    """Choose how a column's engine gets a 4-bit base; one that is not the config's own, as if it were."""
    by_host = (cfg.get("dpo_plugin") or {}).get("loading") == "host"
    planned = replace(engine, name=column.removesuffix("_offload"))
    return Loading.choose("host" if by_host else None, cfg, planned)


def plan_input(
    cfg: Mapping[str, Any],
    column: str,
    ranks: int,
    engine: EngineSettings,
    reference: ReferenceConfig,
    compute: ComputeConfig,
) -> PlanInput:
    """Collect what decides how many bytes a config's model takes on an engine."""
    optimizer = str(cfg.get("optimizer") or "adamw_torch_fused")
    quantiser, full = cfg.get("bnb_config_kwargs") or {}, not cfg.get("adapter")
    bits = 4 if cfg.get("load_in_4bit") else 8 if cfg.get("load_in_8bit") else None
    storage = getattr(torch, str(quantiser.get("bnb_4bit_quant_storage", "bfloat16")).removeprefix("torch."))
    plain = cfg.get("attn_implementation") in (None, "eager", "sdpa")
    return PlanInput(
        ranks=ranks,
        bits=bits,
        double_quant=bool(quantiser.get("bnb_4bit_use_double_quant", True)),
        packed=storage.itemsize,
        width=2 if half(cfg) else 4,
        moments=2 * (1 + 4 / 256) if "8bit" in optimizer else None,  # a byte each, and fp32 per block of 256
        fused="fused" in optimizer or "8bit" in optimizer,
        upcast=not (bits == 4 and cfg.get("embeddings_skip_upcast")),
        stays_fp32=column == "ddp" and full and half(cfg) and plain,
        masters=compute.master_weights and full and column in ("ddp", "fsdp2") and in_bf16(cfg),
        second_model=full and reference_strategy(cfg, reference).needs_second_model,
        checkpointed=bool(cfg.get("gradient_checkpointing") or fsdp_keys(cfg).get("activation_checkpointing")),
        in_parts=loading(cfg, column, engine).sharded,
    )


def longest_step(cfg: Mapping[str, Any], compute: ComputeConfig, config: Any, given: PlanInput, column: str) -> Step:
    """Describe the longest checkpointed forward: micro_batch_size pairs of 2 × sequence_len, or ``max_tokens``."""
    length, pairs = int(cfg.get("sequence_len") or 512), int(cfg.get("micro_batch_size") or 1)
    if (most := compute.max_tokens) is not None:
        length = min(length, -(-most // 2))
        pairs = max(1, min(pairs, most // (2 * length)))
    flat = compute.prefix_sharing is not False and attention.prefix_sharing_blocker(config) is None
    eager = cfg.get("attn_implementation") == "eager" or cfg.get("eager_attention")
    return Step(
        pairs=pairs,
        length=length,
        checkpointed=True,
        attention="eager" if eager else attention.NAME if flat else "sdpa",
        autocast=given.width == 2 and not column.startswith("zero3"),
        fp32_adapters=column == "ddp",
        fp32_others=given.stays_fp32 and not given.masters,
        chunk=compute.logits_chunk,
    )
