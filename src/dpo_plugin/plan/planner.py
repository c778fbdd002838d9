"""``axolotl dpo plan``: what each engine needs per GPU, from the YAML and the base model's config.json alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from dpo_plugin.config import DPOPluginConfig, parse_config
from dpo_plugin.engines.config import WRITE_SHIPPED, EngineSettings, fsdp_keys, may_load_once
from dpo_plugin.engines.loading import Loading
from dpo_plugin.errors import ConfigError, DPOPluginError
from dpo_plugin.plan import engines, inputs
from dpo_plugin.plan.activations import Activations, PlannedModel
from dpo_plugin.plan.changes import possible_changes
from dpo_plugin.plan.engines import COLUMNS, EngineBytes, PlanInput
from dpo_plugin.plan.machine import Machine, MemoryNeed
from dpo_plugin.plan.table import engine_lines

GIB = 2**30

CONTEXT = 3 * GIB // 2
"""Bytes of a GPU that CUDA's context, cuBLAS and NCCL take besides tensors: assumed, not measured."""

PROCESS = 2 * GIB
"""Bytes of the host that a process takes: 0.74 GiB were measured for its imports, the rest is assumed."""


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


def this_machine() -> Machine:
    """Describe the machine of a run that is about to start; its GPUs' memory is not asked for."""
    return Machine(int(os.environ.get("LOCAL_WORLD_SIZE") or 0) or torch.cuda.device_count() or 1, 0, memory_here())


_MODELS: dict[str, PlannedModel] = {}


class Planner:
    """Plans one config and variants of it; ``settings`` and ``engine`` are the config's, where they have been read.

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
        inputs.check(cfg, path)
        self.cfg, self.path, self.machine = cfg, path, machine
        self.engine = engine or EngineSettings.read(cfg)
        self.used = inputs.planned_engine(cfg, self.engine)
        settings = settings or parse_config(cfg.get("dpo_plugin"))
        Loading.choose(settings.loading, cfg, self.engine)  # its error, where `sharded` cannot be
        self.compute, self.reference = settings.compute, settings.reference
        inputs.adapter_configs(cfg, self.reference)  # its errors before the hub is asked
        self.config = inputs.model_config(cfg)

    def model(self, cfg: Mapping[str, Any]) -> PlannedModel:
        """The model of a variant, built and measured once for all configs of a process that have its shape."""
        adapters = inputs.adapter_configs(cfg, self.reference)
        dtype = torch.bfloat16 if inputs.half(cfg) else torch.float32
        flags = bool(cfg.get("trust_remote_code")), bool(cfg.get("quantize_moe_experts"))
        shape = self.config.to_dict()
        if not flags[0]:  # else the name says whose code it is
            shape.pop("_name_or_path", None)
        key = repr((shape, dtype, adapters, flags))
        if key not in _MODELS:
            try:
                _MODELS[key] = PlannedModel(self.config, adapters, dtype, *flags)
            except (ValueError, RuntimeError, ImportError) as error:
                raise ConfigError(
                    f"`base_model: {cfg.get('base_model')}` with these LoRA settings cannot be built: {error} "
                    "Write: lora_target_linear: true"
                ) from error
        return _MODELS[key]

    def given(self, column: str, cfg: Mapping[str, Any]) -> PlanInput:
        """Collect what decides about a variant's bytes on an engine."""
        return inputs.plan_input(cfg, column, self.machine.gpus, self.engine, self.reference, self.compute)

    def engine_bytes(self, column: str, cfg: Mapping[str, Any], given: PlanInput) -> EngineBytes:
        """Compute what an engine holds besides activations."""
        sizes = self.model(cfg).sizes
        if column == "ddp":
            return engines.ddp(sizes, given)
        if column == "fsdp2":
            fsdp = self.engine.fsdp
            one_rank_loads = bool(fsdp.get("cpu_ram_efficient_loading", not fsdp and may_load_once(cfg)))
            return engines.fsdp2(sizes, given, bool(fsdp_keys(cfg).get("offload_params")), one_rank_loads)
        hidden = self.config.get_text_config().hidden_size
        return engines.zero3(sizes, given, inputs.zero3_settings(self.engine, column, hidden, given.width))

    def activations(self, cfg: Mapping[str, Any], given: PlanInput, column: str) -> Activations:
        """Compute a variant's activations; the first ``checkpoint_layers`` decoder layers are checkpointed, or all."""
        model, wanted = self.model(cfg), self.compute.checkpoint_layers
        layers = model.sizes.layers
        count = min(wanted, layers) if isinstance(wanted, int) else layers
        by_fsdp = column == "fsdp2" and self.engine.fsdp.get("activation_checkpointing")
        again = inputs.longest_step(cfg, self.compute, self.config, given, column)
        whole = replace(again, checkpointed=False)
        if count == 0 or not (cfg.get("gradient_checkpointing") or by_fsdp):
            return model.activations(whole)
        found = model.activations(again)
        if count < layers:
            more = model.activations(whole).kept - model.activations(whole, count).kept
            found = replace(found, kept=model.activations(again, count).kept + more)
        return found

    def need(self, column: str, cfg: Mapping[str, Any]) -> MemoryNeed:
        """Compute what an engine needs for a variant."""
        given = self.given(column, cfg)
        held = self.engine_bytes(column, cfg, given)
        try:
            found = self.activations(cfg, given, column)
        except DPOPluginError:
            raise
        except Exception as error:  # a model's own code: this attention, an operation that needs values, and others
            raise ConfigError(
                f"`base_model: {cfg.get('base_model')}` ({self.config.model_type}) does not run without data: {error}. "
                "Write: attn_implementation: eager"
            ) from error
        working = max(found.forward, found.backward, held.update - found.kept, 0)
        parts = {**held.parts, "activations": found.kept, "working set": working, "CUDA context": CONTEXT}
        load_parts = {**held.load_parts, "CUDA context": CONTEXT}
        return MemoryNeed(parts, load_parts, found.loss, held.host + self.machine.gpus * PROCESS)

    def change(self, column: str) -> dict[str, Any] | None:
        """Find keys that make the config fit an engine: empty if it fits; None if nothing that was tried makes it."""
        made: list[dict[str, Any]] = []
        while limit := self._need(column, made).limit(self.machine):
            tried = possible_changes(self._changed(made), column, limit, self.engine, any("adapter" in m for m in made))
            fits_host = (one for one in tried if self._need(column, [*made, one]).host <= self.machine.host)
            if (more := next(fits_host, None)) is None:
                return None
            made.append(more)
        for one in reversed(made):  # a later change may have made an earlier one useless
            others = [other for other in made if other is not one]
            if self._need(column, others).limit(self.machine) is None:
                made = others
        return {key: value for one in made for key, value in one.items()}

    def _changed(self, made: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.cfg, **{key: value for one in made for key, value in one.items()}}

    def _need(self, column: str, made: list[dict[str, Any]]) -> MemoryNeed:
        return self.need(column, self._changed(made))

    def verdict(self, column: str) -> dict[str, Any]:
        """Report one engine's numbers, whether it fits, what limits it, and what to write."""
        if self.cfg.get("load_in_8bit") and column != "ddp":
            return {"fits": False, "limit": "load_in_8bit", "change": None, "recipe": []}
        need, change = self.need(column, self.cfg), self.change(column)
        limit = need.limit(self.machine)
        return {
            "fits": limit is None,
            "limit": limit,
            "load_gib": gib(need.load),
            "step_gib": gib(need.step),
            "host_gib": gib(need.host),
            "parts_gib": {part: gib(size) for part, size in need.parts.items()},
            "load_parts_gib": {part: gib(size) for part, size in need.load_parts.items()},
            "loss_stage_gib": gib(need.loss),
            "change": change,
            "recipe": [] if change is None else self._recipe(column, change),
        }

    def _recipe(self, column: str, change: dict[str, Any]) -> list[str]:
        """Write the lines of a change, and those that switch to the engine where it is not the config's own."""
        changed, lines = {**self.cfg, **change}, []
        if column != self.used:
            lines = engine_lines(column, changed, self.model(changed).sizes.layer_class)
            change = {key: value for key, value in change.items() if key != "fsdp_config"}  # those lines have it
        written = (yaml.safe_dump({key: value}, sort_keys=False) for key, value in change.items())
        return [*lines, *(line for text in written for line in text.splitlines())]

    def result(self) -> dict[str, Any]:
        """Plan every engine, JSON-ready.

        Raises:
            ConfigError: If the config offloads to a host that has too little memory.
        """
        if shortage := self.host_shortage():
            raise ConfigError(shortage)
        sizes = self.model(self.cfg).sizes
        given, copied = self.given(self.used, self.cfg), self.copy_bytes()
        step = inputs.longest_step(self.cfg, self.compute, self.config, given, self.used)
        return {
            "config": self.path,
            "engine": self.used,
            "gpus": self.machine.gpus,
            "gpu_memory_gib": gib(self.machine.gpu),
            "host_memory_gib": gib(self.machine.host),
            "parameters": sum(sizes.linear) + sum(sizes.other),
            "trained_parameters": sizes.trained,
            "reference_adapter_parameters": sum(sizes.reference),
            "bits": given.bits,
            "copy_on_disk_gib": copied and gib(copied),
            "tokens_per_forward": 2 * step.pairs * step.length,
            "engines": {column: self.verdict(column) for column in COLUMNS},
            "notes": self._notes(),
        }

    def base_bytes(self) -> int:
        """Count bytes of the base as it is quantised, or not."""
        sizes, given = self.model(self.cfg).sizes, self.given(self.used, self.cfg)
        return sum(engines.linear_bytes(sizes, given)) + sum(sizes.other) * given.width

    def load_peak(self) -> int:
        """Count bytes of a GPU while the base is loaded on the config's own engine."""
        return self.engine_bytes(self.used, self.cfg, self.given(self.used, self.cfg)).load + CONTEXT

    def host_shortage(self) -> str | None:
        """Explain that the config offloads to a host with too little memory; None where it does not."""
        if not self.engine.offloads:
            return None
        need, has = self.need(self.used, self.cfg).host, self.machine.host
        if need <= has:
            return None
        key = "fsdp_config.offload_params" if self.used == "fsdp2" else "deepspeed"
        return (
            f"`{key}` moves what it can to the host, which takes {gib(need)} GiB for all ranks and has {gib(has)}. "
            f"Take a node of {math.ceil(need / GIB)} GiB (plan takes --host-memory {math.ceil(need / GIB)}). "
            + WRITE_SHIPPED
        )

    def copy_bytes(self) -> int | None:
        """Count bytes on disk of the copy in 4 bits that ZeRO-3 and FSDP2 load in parts; None where they cannot."""
        return self.base_bytes() if self.given("fsdp2", self.cfg).in_parts else None

    def _notes(self) -> list[str]:
        cfg, notes = self.cfg, []
        if copied := self.copy_bytes():
            notes.append(
                "ZeRO-3 and FSDP2 load the base in parts from a copy in 4 bits, made at the first start: it takes "
                f"{gib(copied):.1f} GiB on disk, next to dataset_prepared_path"
            )
        elif cfg.get("load_in_4bit") and self.engine.shards_parameters:
            why = inputs.loading(cfg, self.used, self.engine).blocker
            notes.append(f"every GPU holds the whole base while it is loaded: {why}")
        folder, optimizer = cfg.get("lora_model_dir"), str(cfg.get("optimizer") or "adamw")
        if cfg.get("adapter") and folder and not (Path(folder) / "adapter_config.json").is_file():
            notes.append(f"`lora_model_dir: {folder}` is not here, so the YAML's lora_* tell the adapters' shape")
        if self.compute.checkpoint_layers == "auto" and cfg.get("gradient_checkpointing"):
            notes.append("checkpoint_layers: auto is planned with all layers checkpointed, the least it may take")
        if "adamw" not in optimizer:
            notes.append(f"`optimizer: {optimizer}` is planned as AdamW, with two states per trained value")
        return notes


def gib(size: float) -> float:
    """Bytes as GiB."""
    return round(size / GIB, 3)
