"""``axolotl dpo plan``: what each engine needs per GPU, from the YAML and the base model's config.json alone."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig
from rich.table import Table
from transformers import AutoConfig

from dpo_plugin.compute import attention, memory
from dpo_plugin.compute.memory import Activations, Held, Model, Run, Step, Zero3
from dpo_plugin.config import parse_config
from dpo_plugin.errors import ConfigError
from dpo_plugin.model.adapters import POLICY, REFERENCE
from dpo_plugin.registry import get_registry

GIB = 2**30
ENGINES = {"ddp": "DDP", "zero3": "ZeRO-3", "zero3_offload": "ZeRO-3 + CPU", "fsdp2": "FSDP2"}
ROWS = (
    "base weights", "reference model", "adapters", "master weights", "gradients", "optimizer", "communication",
    "weight in full", "activations", "working set", "CUDA context",
)  # fmt: skip

CONTEXT = 3 * GIB // 2
"""Bytes of a GPU that CUDA's context, cuBLAS and NCCL take beside tensors: assumed, not measured."""

PROCESS = 2 * GIB
"""Bytes of the host that a process takes: 0.74 GiB were measured for its imports, the rest is assumed."""

SHIPPED = "deepspeed_configs/zero3_bf16.json"
SHIPPED_ZERO3 = Zero3(persistence=1_048_576, prefetch=104_857_600, bucket=104_857_600)
"""The settings of `SHIPPED`, for a config that names no ZeRO-3 of its own."""

SHORTEST = 512
"""Least ``sequence_len`` that is proposed."""


@dataclass(frozen=True)
class Machine:
    """GPUs of one node, and bytes of each of them and of the host."""

    gpus: int
    gpu: int
    host: int


@dataclass(frozen=True)
class Need:
    """Bytes on each GPU, and on the host for all ranks; the values of ``parts`` add up to ``step``."""

    parts: dict[str, int]
    loss: int
    load: int
    step: int
    host: int

    def limit(self, machine: Machine) -> str | None:
        """What does not fit, load, step or host; None if all does."""
        over = {"load": self.load - machine.gpu, "step": self.step - machine.gpu, "host": self.host - machine.host}
        return next((name for name, excess in over.items() if excess > 0), None)


def make_plan(path: str, gpus: int, gpu_memory: float, host_memory: float | None = None) -> dict[str, Any]:
    """Plan a config.

    Args:
        path: The YAML.
        gpus: GPUs of the node, one process each.
        gpu_memory: GiB of each.
        host_memory: GiB of the node; None for this machine's.

    Returns:
        JSON-ready values; sizes in GiB.

    Raises:
        ConfigError: If the config or the machine shows that it cannot run.
    """
    for flag, value, least in (("--gpus", gpus, 1), ("--gpu-memory", gpu_memory, 0.01)):
        if value < least:
            raise ConfigError(f"`{flag} {value}` leaves nothing to plan for. Write: --gpus 8 --gpu-memory 80")
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    host = here if host_memory is None else round(host_memory * GIB)
    cfg = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    return Planner(cfg, path, Machine(gpus, round(gpu_memory * GIB), host)).result()


# ── what the YAML says ──


def check(cfg: Mapping[str, Any], path: str) -> str:
    """The engine that a config uses.

    Raises:
        ConfigError: If the YAML alone shows that the run cannot be.
    """
    adapter, four, eight = cfg.get("adapter"), bool(cfg.get("load_in_4bit")), bool(cfg.get("load_in_8bit"))
    if "dpo_plugin.DPOPlugin" not in (cfg.get("plugins") or []):
        raise ConfigError(f"{path} does not use dpo_plugin. Write: plugins: [dpo_plugin.DPOPlugin]")
    if cfg.get("rl") not in ("dpo", "ipo"):
        raise ConfigError(f"`rl: {cfg.get('rl')}` in {path} is not what dpo_plugin trains. Write: rl: dpo")
    if adapter not in (None, "lora", "qlora"):
        raise ConfigError(f"`adapter: {adapter}` cannot be held twice on one base. Write: adapter: lora")
    if (adapter == "qlora") != four or (eight and adapter != "lora"):
        raise ConfigError(
            f"`load_in_4bit: {four}` and `load_in_8bit: {eight}` do not go with `adapter: {adapter}`: axolotl takes "
            "4 bits for qlora alone and 8 for lora alone. Write: adapter: qlora, load_in_4bit: true"
        )
    engines = [key for key in ("deepspeed", "fsdp_config", "fsdp") if cfg.get(key)]
    if engines[:1] == ["deepspeed"] and len(engines) > 1:
        raise ConfigError(f"`deepspeed` and `{engines[1]}` are both set, and one has to go. Write: {engines[1]}: null")
    if engines and eight:
        raise ConfigError(
            f"`{engines[0]}` does not partition the int8 weights of `load_in_8bit: true`. "
            "Write: adapter: qlora, load_in_4bit: true, load_in_8bit: false"
        )
    if not engines:
        return "ddp"
    if engines == ["deepspeed"]:
        return "zero3_offload" if any(offloads(deepspeed_config(cfg["deepspeed"])).values()) else "zero3"
    return _check_fsdp(fsdp_config(cfg), cfg.get("fsdp_version"), four)


def _check_fsdp(fsdp: Mapping[str, Any], version: Any, four: bool) -> str:
    version = version or fsdp.get("version")
    if str(version) != "2":
        raise ConfigError(f"`fsdp_version: {version}` is FSDP1, which is not planned. Write: fsdp_version: 2")
    if four and fsdp.get("cpu_ram_efficient_loading"):
        raise ConfigError(
            "`fsdp_config.cpu_ram_efficient_loading: true` is refused by axolotl with load_in_4bit: one rank would "
            "quantise what the others hold in full. Write: cpu_ram_efficient_loading: false"
        )
    return "fsdp2"


def fsdp_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """``fsdp_config`` with its keys' old prefix taken off, as axolotl does."""
    return {key.removeprefix("fsdp_"): value for key, value in (cfg.get("fsdp_config") or {}).items()}


def deepspeed_config(deepspeed: Any) -> dict[str, Any]:
    """The DeepSpeed config.

    Raises:
        ConfigError: If it is missing, not JSON, or not ZeRO-3.
    """
    found = deepspeed
    if not isinstance(deepspeed, Mapping):
        if not Path(deepspeed).is_file():
            raise ConfigError(f"`deepspeed: {deepspeed}` does not exist. Write: deepspeed: {SHIPPED}")
        try:
            found = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"`deepspeed: {deepspeed}` is not JSON: {error}. Write: deepspeed: {SHIPPED}") from error
    zero = found.get("zero_optimization") if isinstance(found, Mapping) else None
    stage = zero.get("stage") if isinstance(zero, Mapping) else None
    if stage != 3:
        raise ConfigError(f"`deepspeed: {deepspeed}` is of stage {stage}; 3 is planned. Write: deepspeed: {SHIPPED}")
    return dict(found)


def offloads(deepspeed: Mapping[str, Any]) -> dict[str, bool]:
    """Whether parameters and optimizer states are moved to the host."""
    keys = {"offload_parameters": "offload_param", "offload_optimizer": "offload_optimizer"}
    found = {name: deepspeed["zero_optimization"].get(key) or {} for name, key in keys.items()}
    return {name: (section.get("device") or "none") != "none" for name, section in found.items()}


def zero3_settings(cfg: Mapping[str, Any], engine: str, hidden: int, width: int) -> Zero3:
    """ZeRO-3's settings: those of the config's JSON, with transformers' values for "auto"; else those of `SHIPPED`."""
    found = deepspeed_config(cfg["deepspeed"]) if cfg.get("deepspeed") else None
    offload = dict.fromkeys(("offload_parameters", "offload_optimizer"), engine == "zero3_offload")
    if found is None:
        return replace(SHIPPED_ZERO3, width=width, **offload)
    if engine == "zero3_offload" and any(offloads(found).values()):
        offload = offloads(found)
    keys = {
        "bucket": ("reduce_bucket_size", hidden**2),
        "prefetch": ("stage3_prefetch_bucket_size", int(0.9 * hidden**2)),
        "persistence": ("stage3_param_persistence_threshold", 10 * hidden),
        "live": ("stage3_max_live_parameters", 10**9),
        "reuse": ("stage3_max_reuse_distance", 10**9),
        "sub_group": ("sub_group_size", 10**9),
    }
    given = {name: (found["zero_optimization"].get(key), auto) for name, (key, auto) in keys.items()}
    numbers: dict[str, Any] = {n: auto if v == "auto" else int(v) for n, (v, auto) in given.items() if v is not None}
    enabled = [(found.get(kind) or {}).get("enabled") for kind in ("bf16", "fp16")]
    narrow = True in enabled or ("auto" in enabled and width == 2)
    return Zero3(width=2 if narrow else 4, **numbers, **offload)


def half(cfg: Mapping[str, Any]) -> bool:
    """Whether the base model is loaded in 16 bits, as axolotl's resolve_dtype decides; ``auto`` is a GPU that can."""
    return any(cfg.get(key) for key in ("bf16", "bfloat16", "fp16", "float16", "load_in_8bit"))


def model_config(cfg: Mapping[str, Any]) -> Any:
    """The base model's transformers config.

    Raises:
        ConfigError: If it cannot be had.
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


def adapter_configs(cfg: Mapping[str, Any]) -> dict[str, LoraConfig]:
    """LoRA settings of policy and reference: those of the adapters' folders where these exist, else the YAML's.

    Raises:
        ConfigError: If neither tells them, or the reference strategy is unknown.
    """
    if not cfg.get("adapter"):
        return {}
    reference = parse_config(cfg.get("dpo_plugin")).reference
    policy = _lora(cfg, cfg.get("lora_model_dir"))
    name = reference.strategy or ("adapter" if cfg.get("lora_model_dir") or reference.adapter_dir else "base")
    strategy = get_registry().reference_strategies.find(name, "dpo_plugin.reference.strategy")
    if not strategy.uses_reference_adapter:
        return {POLICY: policy}
    return {POLICY: policy, REFERENCE: _lora(cfg, reference.adapter_dir) if reference.adapter_dir else policy}


def _lora(cfg: Mapping[str, Any], folder: Any) -> LoraConfig:
    if folder and (Path(folder) / "adapter_config.json").is_file():
        found = LoraConfig.from_pretrained(str(folder))
        found.inference_mode = False
        return found
    targets = "all-linear" if cfg.get("lora_target_linear") else cfg.get("lora_target_modules")
    for key, value in (("lora_r", cfg.get("lora_r")), ("lora_target_modules", targets)):
        if not value:
            where = f", and `{folder}` has no adapter_config.json that tells it" if folder else ""
            raise ConfigError(f"`{key}` is missing{where}. Write: lora_r: 16 and lora_target_linear: true")
    saved = cfg.get("lora_modules_to_save") or None
    return LoraConfig(r=int(cfg["lora_r"]), target_modules=targets, modules_to_save=saved, task_type="CAUSAL_LM")


def check_targets(settings: LoraConfig, base: torch.nn.Module) -> None:
    """Check that every entry of ``lora_target_modules`` names a module.

    Raises:
        ConfigError: Naming the entry and what there is.
    """
    targets, names = settings.target_modules or [], [name for name, _ in base.named_modules()]
    if isinstance(targets, str):
        missing = [] if targets == "all-linear" or any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        missing = [one for one in sorted(targets) if not any(f".{name}".endswith(f".{one}") for name in names)]
    if missing:
        linear = {name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
        raise ConfigError(
            f"`lora_target_modules` has {missing[0]!r}, which the base model does not have. "
            f"Write: lora_target_modules: [{', '.join(sorted(linear - {'lm_head'}))}]"
        )


# ── the plan ──


class Planner:
    """Plans one config and variants of it.

    Args:
        cfg: The YAML.
        path: Its file, for messages.
        machine: What there is.

    Raises:
        ConfigError: If the config shows that it cannot run.
    """

    def __init__(self, cfg: Mapping[str, Any], path: str, machine: Machine):
        self.cfg, self.path, self.machine = cfg, path, machine
        self.used = check(cfg, path)
        settings = parse_config(cfg.get("dpo_plugin"))
        self.compute, self.strategy = settings.compute, settings.reference.strategy
        self._models: dict[str, Model] = {}
        adapter_configs(cfg)  # its errors before the hub is asked
        self.config = model_config(cfg)

    def model(self, cfg: Mapping[str, Any]) -> Model:
        """The model of a variant, built once."""
        adapters, dtype = adapter_configs(cfg), torch.bfloat16 if half(cfg) else torch.float32
        key = repr((dtype, adapters))
        if key not in self._models:
            trust = bool(cfg.get("trust_remote_code"))
            try:
                base = memory.on_meta(self.config, {}, dtype, trust)
                for settings in adapters.values():
                    check_targets(settings, base)
                self._models[key] = Model(self.config, adapters, dtype, trust)
            except (ValueError, RuntimeError, ImportError) as error:
                raise ConfigError(
                    f"`base_model: {cfg.get('base_model')}` with these LoRA settings cannot be built: {error} "
                    "Write: lora_target_linear: true"
                ) from error
        return self._models[key]

    def run(self, cfg: Mapping[str, Any], engine: str) -> Run:
        """How an engine holds the model of a variant."""
        optimizer = str(cfg.get("optimizer") or "adamw_torch_fused")
        quantiser, full = cfg.get("bnb_config_kwargs") or {}, not cfg.get("adapter")
        bits = 4 if cfg.get("load_in_4bit") else 8 if cfg.get("load_in_8bit") else None
        storage = getattr(torch, str(quantiser.get("bnb_4bit_quant_storage", "bfloat16")).removeprefix("torch."))
        plain = cfg.get("attn_implementation") in (None, "eager", "sdpa")
        return Run(
            ranks=self.machine.gpus,
            bits=bits,
            double_quant=bool(quantiser.get("bnb_4bit_use_double_quant", True)),
            packed=storage.itemsize,
            width=2 if half(cfg) else 4,
            moments=2 * (1 + 4 / 256) if "8bit" in optimizer else None,  # a byte each, and fp32 per block of 256
            fused="fused" in optimizer or "8bit" in optimizer,
            upcast=not (bits == 4 and cfg.get("embeddings_skip_upcast")),
            stays_fp32=engine == "ddp" and full and half(cfg) and plain,
            second_model=full and self.strategy in (None, "model"),
        )

    def held(self, engine: str, cfg: Mapping[str, Any], run: Run) -> Held:
        """What an engine holds beside activations."""
        sizes = self.model(cfg).sizes
        if engine == "ddp":
            return memory.ddp(sizes, run)
        if engine == "fsdp2":
            fsdp = fsdp_config(cfg)
            one_rank_loads = bool(fsdp.get("cpu_ram_efficient_loading", not fsdp))
            return memory.fsdp2(sizes, run, bool(fsdp.get("offload_params")), one_rank_loads)
        hidden = self.config.get_text_config().hidden_size
        return memory.zero3(sizes, run, zero3_settings(cfg, engine, hidden, run.width))

    def step(self, cfg: Mapping[str, Any], run: Run, engine: str, checkpointed: bool) -> Step:
        """The longest forward of a variant: micro_batch_size pairs of 2 × sequence_len, or ``max_tokens``."""
        length, pairs = int(cfg.get("sequence_len") or 512), int(cfg.get("micro_batch_size") or 1)
        if (most := self.compute.max_tokens) is not None:
            length = min(length, -(-most // 2))
            pairs = max(1, min(pairs, most // (2 * length)))
        flat = self.compute.prefix_sharing is not False and attention.why_two_rows(self.config) is None
        eager = cfg.get("attn_implementation") == "eager" or cfg.get("eager_attention")
        return Step(
            pairs=pairs,
            length=length,
            checkpointed=checkpointed,
            attention="eager" if eager else attention.NAME if flat else "sdpa",
            autocast=run.width == 2 and not engine.startswith("zero3"),
            fp32_adapters=engine == "ddp",
            fp32_others=run.stays_fp32,
            chunk=self.compute.logits_chunk,
        )

    def activations(self, cfg: Mapping[str, Any], run: Run, engine: str) -> Activations:
        """Activations of a variant; the first ``checkpoint_layers`` decoder layers are checkpointed, or all."""
        model, wanted = self.model(cfg), self.compute.checkpoint_layers
        layers = model.sizes.layers
        count = min(wanted, layers) if isinstance(wanted, int) else layers
        by_fsdp = engine == "fsdp2" and fsdp_config(cfg).get("activation_checkpointing")
        whole, again = (self.step(cfg, run, engine, checkpointed) for checkpointed in (False, True))
        if count == 0 or not (cfg.get("gradient_checkpointing") or by_fsdp):
            return model.activations(whole)
        found = model.activations(again)
        if count < layers:
            more = model.activations(whole).kept - model.activations(whole, count).kept
            found = replace(found, kept=model.activations(again, count).kept + more)
        return found

    def need(self, engine: str, cfg: Mapping[str, Any]) -> Need:
        """What an engine needs for a variant."""
        run = self.run(cfg, engine)
        held = self.held(engine, cfg, run)
        try:
            found = self.activations(cfg, run, engine)
        except (ValueError, RuntimeError) as error:  # this attention, or an operation that needs values
            raise ConfigError(
                f"`base_model: {cfg.get('base_model')}` ({self.config.model_type}) does not run without data: {error}. "
                "Write: attn_implementation: eager"
            ) from error
        working = max(found.working, held.update - found.kept)
        parts = {**held.parts, "activations": found.kept, "working set": working, "CUDA context": CONTEXT}
        host = held.host + self.machine.gpus * PROCESS
        return Need(parts, found.loss, held.load + CONTEXT, sum(parts.values()), host)

    def change(self, engine: str) -> dict[str, Any] | None:
        """Keys that make the config fit an engine, none if it does; None if it does not with any that were tried."""
        made: dict[str, Any] = {}
        while limit := self.need(engine, {**self.cfg, **made}).limit(self.machine):
            more = _next_change({**self.cfg, **made}, engine, limit, "adapter" in made)
            if more is None:
                return None
            if more.get("load_in_4bit") is False:
                made.pop("embeddings_skip_upcast", None)  # of no use then
            made |= more
        return made

    def verdict(self, engine: str) -> dict[str, Any]:
        """One engine's numbers, whether it fits, what limits it, and what to write."""
        if self.cfg.get("load_in_8bit") and engine != "ddp":
            return {"fits": False, "limit": "load_in_8bit", "change": None, "recipe": []}
        need, change = self.need(engine, self.cfg), self.change(engine)
        limit = need.limit(self.machine)
        lines = [yaml.safe_dump({key: value}).strip() for key, value in (change or {}).items()]
        return {
            "fits": limit is None,
            "limit": limit,
            "largest_part": max(need.parts, key=lambda part: need.parts[part]),
            "load_gib": gib(need.load),
            "step_gib": gib(need.step),
            "host_gib": gib(need.host),
            "parts_gib": {part: gib(size) for part, size in need.parts.items()},
            "loss_stage_gib": gib(need.loss),
            "change": change,
            "recipe": [] if change is None else [*self._engine_lines(engine, {**self.cfg, **change}), *lines],
        }

    def _engine_lines(self, engine: str, cfg: Mapping[str, Any]) -> list[str]:
        lines: list[str] = []
        if engine == self.used:
            return lines
        if engine.startswith("zero3"):
            moved = ' with "offload_param": {"device": "cpu"} and "offload_optimizer": {"device": "cpu"}'
            copy = f"<a copy of {SHIPPED}{moved} in zero_optimization>"
            lines = [f"deepspeed: {SHIPPED if engine == 'zero3' else copy}"]
        if engine == "fsdp2":
            four, kind = bool(cfg.get("load_in_4bit")), self.model(cfg).sizes.layer_class
            number = '"2"  # a string: axolotl 0.19 refuses the number with rl and 4 bits' if four else "2"
            keys = f"offload_params: false, cpu_ram_efficient_loading: {str(not four).lower()}"
            wrap = f"auto_wrap_policy: TRANSFORMER_BASED_WRAP, transformer_layer_cls_to_wrap: {kind}"
            more = "reshard_after_forward: true, state_dict_type: FULL_STATE_DICT"
            lines = [f"fsdp_version: {number}", f"fsdp_config: {{{keys}, {wrap}, {more}}}"]
        written = {line.partition(":")[0] for line in lines}
        others = ("deepspeed", "fsdp", "fsdp_config", "fsdp_version")
        return [*(f"{key}: null" for key in others if cfg.get(key) and key not in written), *lines]

    def result(self) -> dict[str, Any]:
        """Everything, JSON-ready.

        Raises:
            ConfigError: If the config offloads to a host that has too little memory.
        """
        self._check_host()
        sizes, run = self.model(self.cfg).sizes, self.run(self.cfg, self.used)
        step, parameters = self.step(self.cfg, run, self.used, True), sum(sizes.linear) + sum(sizes.other)
        return {
            "config": self.path,
            "engine": self.used,
            "gpus": self.machine.gpus,
            "gpu_memory_gib": gib(self.machine.gpu),
            "host_memory_gib": gib(self.machine.host),
            "parameters": parameters,
            "trained_parameters": sizes.trained,
            "reference_adapter_parameters": sum(sizes.reference),
            "bits": run.bits,
            "tokens_per_forward": 2 * step.pairs * step.length,
            "engines": {engine: self.verdict(engine) for engine in ENGINES},
            "two_copies_gib": two_copies(parameters),
            "notes": self._notes(),
        }

    def _check_host(self) -> None:
        moved = self.used == "fsdp2" and fsdp_config(self.cfg).get("offload_params")
        if self.used != "zero3_offload" and not moved:
            return
        key = "fsdp_config.offload_params" if moved else "deepspeed"
        need, has = self.need(self.used, self.cfg).host, self.machine.host
        if need > has:
            raise ConfigError(
                f"`{key}` moves what it can to the host, which takes {gib(need)} GiB for all ranks and has {gib(has)}. "
                f"Write: --host-memory {math.ceil(need / GIB)} if the node has as much, else deepspeed: {SHIPPED}"
            )

    def _notes(self) -> list[str]:
        cfg, notes = self.cfg, []
        folder, optimizer = cfg.get("lora_model_dir"), str(cfg.get("optimizer") or "adamw")
        if cfg.get("adapter") and folder and not (Path(folder) / "adapter_config.json").is_file():
            notes.append(f"`lora_model_dir: {folder}` is not here, so the YAML's lora_* tell the adapters' shape")
        if self.compute.checkpoint_layers == "auto" and cfg.get("gradient_checkpointing"):
            notes.append("checkpoint_layers: auto is planned with all layers checkpointed, the least it may take")
        if "adamw" not in optimizer:
            notes.append(f"`optimizer: {optimizer}` is planned as AdamW, with two states per trained value")
        return notes


def _next_change(cfg: Mapping[str, Any], engine: str, limit: str, tried: bool) -> dict[str, Any] | None:
    """The next change to try: first what leaves the result as it is, a shorter sequence last."""
    length, pairs = int(cfg.get("sequence_len") or 512), int(cfg.get("micro_batch_size") or 1)
    four = bool(cfg.get("load_in_4bit"))
    if limit == "load" and four and engine != "fsdp2" and not cfg.get("embeddings_skip_upcast"):
        return {"embeddings_skip_upcast": True}
    if limit == "load" and four and engine != "ddp" and not tried:
        return {"adapter": "lora", "load_in_4bit": False}  # zero.Init and FSDP2 shard it as it is read
    if limit == "step" and not cfg.get("gradient_checkpointing"):
        return {"gradient_checkpointing": True}
    if limit == "step" and pairs > 1:
        return {"micro_batch_size": pairs // 2}
    if limit != "host" and not four and not tried:
        fresh = {} if cfg.get("adapter") else {"lora_r": 16, "lora_alpha": 16, "lora_target_linear": True}
        eight = {"load_in_8bit": False} if cfg.get("load_in_8bit") else {}
        return {"adapter": "qlora", "load_in_4bit": True, **eight, **fresh}
    if limit == "step" and length // 2 >= SHORTEST:
        return {"sequence_len": length // 2}
    return None


def two_copies(parameters: int) -> dict[str, float]:
    """GiB of full fine-tuning in bf16 with a second model as the reference, AdamW's states in bf16 too."""
    sizes = {"policy": 2 * parameters, "reference": 2 * parameters, "optimizer": 4 * parameters}
    return {**{part: gib(size) for part, size in sizes.items()}, "total": gib(sum(sizes.values()))}


def gib(size: float) -> float:
    """Bytes as GiB."""
    return round(size / GIB, 3)


# ── for people ──


def plan_report(plan: Mapping[str, Any]) -> list[Any]:
    """The plan as a table and lines for the terminal."""
    known = {engine: found for engine, found in plan["engines"].items() if "parts_gib" in found}
    table = Table("", title=f"{plan['config']}: GiB on each of {plan['gpus']} GPUs of {plan['gpu_memory_gib']:g} GiB")
    for engine in known:
        table.add_column(ENGINES[engine] + (" (config)" if engine == plan["engine"] else ""), justify="right")
    for part in ROWS:
        sizes = [found["parts_gib"].get(part, 0) for found in known.values()]
        if any(sizes):
            table.add_row(part, *(f"{size:.2f}" if size else "" for size in sizes))
    table.add_section()
    for key, name in (("load_gib", "peak of loading"), ("step_gib", "peak of a step"), ("host_gib", "host, all ranks")):
        table.add_row(name, *(f"{found[key]:.2f}" for found in known.values()))
    table.add_row("fits", *("yes" if found["fits"] else f"no: {found['limit']}" for found in known.values()))
    return [table, *(line for engine in ENGINES for line in _engine_report(plan, engine)), *_last_lines(plan)]


def _engine_report(plan: Mapping[str, Any], engine: str) -> list[str]:
    """Whether an engine fits, what limits it, and what to write."""
    found = plan["engines"][engine]
    name = ENGINES[engine] + (" (this config)" if engine == plan["engine"] else "")
    if "parts_gib" not in found:
        return [f"{name} does not partition int8 weights. Write: adapter: qlora, load_in_4bit: true"]
    load, step, host = (f"{found[key]:.1f} GiB" for key in ("load_gib", "step_gib", "host_gib"))
    said = {
        None: f"fits, with {load} while loading and {step} in a step",
        "load": f"does not fit: loading takes {load}",
        "step": f"does not fit: a step takes {step}, most of it {found['largest_part']}",
        "host": f"does not fit: the host needs {host} and has {plan['host_memory_gib']:.1f}",
    }[found["limit"]]
    if found["change"] is None:
        return [f"{name} {said}. None of the changes tried makes it fit: take more GPUs or another engine."]
    return [f"{name} {said}.{' Write:' if found['recipe'] else ''}", *(f"    {line}" for line in found["recipe"])]


def _last_lines(plan: Mapping[str, Any]) -> list[str]:
    """What was counted, and the comparison with two full copies."""
    two, loss = plan["two_copies_gib"], plan["engines"][plan["engine"]]["loss_stage_gib"]
    return [
        f"{plan['parameters']:,} parameters, {plan['trained_parameters']:,} trained; a forward of at most "
        f"{plan['tokens_per_forward']:,} tokens; scoring takes {loss:.2f} GiB of activations and working set.",
        f"Two full copies in bf16, with AdamW in bf16: {two['policy']:.0f} + {two['reference']:.0f} + "
        f"{two['optimizer']:.0f} = {two['total']:.0f} GiB, before gradients and activations.",
        *(f"Note: {note}." for note in plan["notes"]),
    ]
