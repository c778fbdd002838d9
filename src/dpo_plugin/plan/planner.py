"""``axolotl dpo plan``: what each engine needs per GPU, from the YAML and the base model's config.json alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from dpo_plugin.compute import attention
from dpo_plugin.config import DPOPluginConfig, parse_config
from dpo_plugin.engines.config import SHIPPED, EngineSettings, may_load_once
from dpo_plugin.errors import ConfigError
from dpo_plugin.plan import engines as sharding
from dpo_plugin.plan import memory
from dpo_plugin.plan.engines import Held, Run
from dpo_plugin.plan.inputs import (
    ENGINES,
    adapter_configs,
    check,
    check_targets,
    half,
    model_config,
    planned_engine,
    zero3_settings,
)
from dpo_plugin.plan.memory import Activations, Model, Step

GIB = 2**30

CONTEXT = 3 * GIB // 2
"""Bytes of a GPU that CUDA's context, cuBLAS and NCCL take beside tensors: assumed, not measured."""

PROCESS = 2 * GIB
"""Bytes of the host that a process takes: 0.74 GiB were measured for its imports, the rest is assumed."""


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


def make_plan(
    cfg: Mapping[str, Any], path: str, gpus: int, gpu_memory: float, host_memory: float | None = None
) -> dict[str, Any]:
    """Plan a config.

    Args:
        cfg: The raw YAML.
        path: Its file, for messages.
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
    host = memory_here() if host_memory is None else round(host_memory * GIB)
    return Planner(cfg, path, Machine(gpus, round(gpu_memory * GIB), host)).result()


def memory_here() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def host_shortage(cfg: Mapping[str, Any], path: str, settings: DPOPluginConfig, engine: EngineSettings) -> str | None:
    """What to say of a run on this machine that offloads to a host without the memory for it.

    Args:
        cfg: The raw YAML of a run that is about to start.
        path: Its name in messages.
        settings: Its ``dpo_plugin`` section.
        engine: Its engine, which `offloads`.

    Raises:
        ConfigError: If the config cannot be planned.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or 0) or torch.cuda.device_count() or 1
    return Planner(cfg, path, Machine(here, 0, memory_here()), settings, engine).host_shortage()


class Planner:
    """Plans one config and variants of it.

    Args:
        cfg: The YAML.
        path: Its file, for messages.
        machine: What there is.
        settings: The ``dpo_plugin`` section, where it has been read.
        engine: The config's engine, where it has been read.

    Raises:
        ConfigError: If the config shows that it cannot run.
    """

    def __init__(
        self,
        cfg: Mapping[str, Any],
        path: str,
        machine: Machine,
        settings: DPOPluginConfig | None = None,
        engine: EngineSettings | None = None,
    ):
        self.cfg, self.path, self.machine = cfg, path, machine
        check(cfg, path)
        self.engine = engine or EngineSettings.read(cfg)
        self.used = planned_engine(cfg, self.engine)
        settings = settings or parse_config(cfg.get("dpo_plugin"))
        self.compute, self.reference = settings.compute, settings.reference
        self._models: dict[str, Model] = {}
        adapter_configs(cfg, self.reference)  # its errors before the hub is asked
        self.config = model_config(cfg)

    def model(self, cfg: Mapping[str, Any]) -> Model:
        """The model of a variant, built once."""
        adapters, dtype = adapter_configs(cfg, self.reference), torch.bfloat16 if half(cfg) else torch.float32
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
        """How an engine held the model of a variant."""
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
            second_model=full and self.reference.strategy in (None, "model"),
        )

    def held(self, engine: str, cfg: Mapping[str, Any], run: Run) -> Held:
        """What an engine holds beside activations."""
        sizes = self.model(cfg).sizes
        if engine == "ddp":
            return sharding.ddp(sizes, run)
        if engine == "fsdp2":
            fsdp = self.engine.fsdp
            one_rank_loads = bool(fsdp.get("cpu_ram_efficient_loading", not fsdp and may_load_once(cfg)))
            return sharding.fsdp2(sizes, run, bool(fsdp.get("offload_params")), one_rank_loads)
        hidden = self.config.get_text_config().hidden_size
        return sharding.zero3(sizes, run, zero3_settings(self.engine, engine, hidden, run.width))

    def step(self, cfg: Mapping[str, Any], run: Run, engine: str, checkpointed: bool) -> Step:
        """The longest forward of a variant: micro_batch_size pairs of 2 × sequence_len, or ``max_tokens``."""
        length, pairs = int(cfg.get("sequence_len") or 512), int(cfg.get("micro_batch_size") or 1)
        if (most := self.compute.max_tokens) is not None:
            length = min(length, -(-most // 2))
            pairs = max(1, min(pairs, most // (2 * length)))
        flat = self.compute.prefix_sharing is not False and attention.prefix_sharing_blocker(self.config) is None
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
        by_fsdp = engine == "fsdp2" and self.engine.fsdp.get("activation_checkpointing")
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
            kind, once = self.model(cfg).sizes.layer_class, str(may_load_once(cfg)).lower()
            keys = f"offload_params: false, cpu_ram_efficient_loading: {once}"
            wrap = f"auto_wrap_policy: TRANSFORMER_BASED_WRAP, transformer_layer_cls_to_wrap: {kind}"
            more = "reshard_after_forward: true, state_dict_type: FULL_STATE_DICT"
            lines = ["fsdp_version: 2", f"fsdp_config: {{{keys}, {wrap}, {more}}}"]
        written = {line.partition(":")[0] for line in lines}
        others = ("deepspeed", "fsdp", "fsdp_config", "fsdp_version")
        return [*(f"{key}: null" for key in others if cfg.get(key) and key not in written), *lines]

    def result(self) -> dict[str, Any]:
        """Everything, JSON-ready.

        Raises:
            ConfigError: If the config offloads to a host that has too little memory.
        """
        if shortage := self.host_shortage():
            raise ConfigError(shortage)
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

    def host_shortage(self) -> str | None:
        """What to say where the config moves weights or states to a host that has too little memory."""
        if not self.engine.offloads:
            return None
        need, has = self.need(self.used, self.cfg).host, self.machine.host
        if need <= has:
            return None
        key = "fsdp_config.offload_params" if self.used == "fsdp2" else "deepspeed"
        return (
            f"`{key}` moves what it can to the host, which takes {gib(need)} GiB for all ranks and has {gib(has)}. "
            f"Take a node of {math.ceil(need / GIB)} GiB (plan takes --host-memory {math.ceil(need / GIB)}). "
            f"Write: deepspeed: {SHIPPED}"
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
