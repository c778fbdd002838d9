"""A plan as people read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from dpo_plugin.engines.config import SHIPPED, fsdp_keys, may_load_once
from dpo_plugin.plan.engines import COLUMNS

OFFLOADED = "deepspeed_configs/zero3_bf16_offload.json"
"""`SHIPPED` with parameters and optimizer states on the host."""

PEAKS = {"load": "peak of loading", "step": "peak of a step", "host": "host, all ranks"}
"""What an engine must fit → its row in the table."""

ROWS = (
    "base weights", "reference model", "adapters", "master weights", "gradients", "optimizer", "communication",
    "weight in full", "activations", "working set", "CUDA context",
)  # fmt: skip

LOAD_ROWS = ("base weights", "reference model", "adapters", "transient", "CUDA context")


def engine_lines(column: str, cfg: Mapping[str, Any], layer_class: str) -> list[str]:
    """Write the YAML lines that switch a config to another engine; FSDP2 wraps the decoder layers, ``layer_class``."""
    lines = []
    if column.startswith("zero3"):
        lines = [f"deepspeed: {SHIPPED if column == 'zero3' else OFFLOADED}"]
    if column == "fsdp2":
        offload = str(bool(fsdp_keys(cfg).get("offload_params"))).lower()
        keys = f"offload_params: {offload}, cpu_ram_efficient_loading: {str(may_load_once(cfg)).lower()}"
        wrap = f"auto_wrap_policy: TRANSFORMER_BASED_WRAP, transformer_layer_cls_to_wrap: {layer_class}"
        more = "reshard_after_forward: true, state_dict_type: FULL_STATE_DICT"
        lines = ["fsdp_version: 2", f"fsdp_config: {{{keys}, {wrap}, {more}}}"]
    written = {line.partition(":")[0] for line in lines}
    others = ("deepspeed", "fsdp", "fsdp_config", "fsdp_version")
    return [*(f"{key}: null" for key in others if cfg.get(key) and key not in written), *lines]


def plan_report(plan: Mapping[str, Any]) -> list[Any]:
    """Lay the plan out as a table and lines for the terminal."""
    known = {engine: found for engine, found in plan["engines"].items() if "parts_gib" in found}
    table = Table("", title=f"{plan['config']}: GiB on each of {plan['gpus']} GPUs of {plan['gpu_memory_gib']:g} GiB")
    for engine in known:
        table.add_column(COLUMNS[engine] + (" (config)" if engine == plan["engine"] else ""), justify="right")
    for prefix, key, rows in (("", "parts_gib", ROWS), ("loading: ", "load_parts_gib", LOAD_ROWS)):
        for part in rows:
            sizes = [found[key].get(part, 0) for found in known.values()]
            if any(sizes):
                table.add_row(prefix + part, *(f"{size:.2f}" if size else "" for size in sizes))
        table.add_section()
    for limit, name in PEAKS.items():
        table.add_row(name, *(f"{found[f'{limit}_gib']:.2f}" for found in known.values()))
    table.add_row("fits", *("yes" if found["fits"] else f"no: {found['limit']}" for found in known.values()))
    return [
        table,
        *(line for engine in COLUMNS for line in _to_write(plan, engine)),
        *(f"axolotl dpo recipes {file} --copy . writes {file}, which is not here." for file in _not_here(known)),
        f"{plan['parameters']:,} parameters, {plan['trained_parameters']:,} trained; a forward of at most "
        f"{plan['tokens_per_forward']:,} tokens; scoring takes "
        f"{plan['engines'][plan['engine']]['loss_stage_gib']:.2f} GiB of activations and working set.",
        *(f"Note: {note}." for note in plan["notes"]),
    ]


def _not_here(engines: Mapping[str, Any]) -> list[str]:
    """The DeepSpeed JSONs that the lines to write name and that are not in this folder, as for who has no checkout."""
    lines = {line for found in engines.values() for line in found["recipe"]}
    return [file for file in (SHIPPED, OFFLOADED) if f"deepspeed: {file}" in lines and not Path(file).is_file()]


def _to_write(plan: Mapping[str, Any], engine: str) -> list[str]:
    """Whether an engine fits, and the lines that make it."""
    found = plan["engines"][engine]
    name = COLUMNS[engine] + (" (this config)" if engine == plan["engine"] else "")
    if "parts_gib" not in found:
        return [f"{name} does not partition int8 weights. Write: adapter: qlora, load_in_4bit: true"]
    said, limit = "fits", found["limit"]
    if limit:
        has = plan["host_memory_gib" if limit == "host" else "gpu_memory_gib"]
        said = f"does not fit: {PEAKS[limit]} {found[f'{limit}_gib']:.1f} of {has:.1f} GiB"
    if found["change"] is None:
        return [f"{name} {said}. None of the changes tried makes it fit: take more GPUs or another engine."]
    return [f"{name} {said}.{' Write:' if found['recipe'] else ''}", *(f"    {line}" for line in found["recipe"])]
