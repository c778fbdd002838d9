"""A plan as people read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from dpo_plugin.engines.config import SHIPPED, may_load_once
from dpo_plugin.plan.engines import COLUMNS

ROWS = (
    "base weights", "reference model", "adapters", "master weights", "gradients", "optimizer", "communication",
    "weight in full", "activations", "working set", "CUDA context",
)  # fmt: skip


def engine_lines(column: str, cfg: Mapping[str, Any], layer_class: str) -> list[str]:
    """Write the YAML lines that switch a config to another engine.

    Args:
        column: The engine.
        cfg: The config.
        layer_class: Name of the decoder layer's class, which FSDP2 wraps.
    """
    lines = []
    if column.startswith("zero3"):
        moved = ' with "offload_param": {"device": "cpu"} and "offload_optimizer": {"device": "cpu"}'
        copy = f"<a copy of {SHIPPED}{moved} in zero_optimization>"
        lines = [f"deepspeed: {SHIPPED if column == 'zero3' else copy}"]
    if column == "fsdp2":
        keys = f"offload_params: false, cpu_ram_efficient_loading: {str(may_load_once(cfg)).lower()}"
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
    for part in ROWS:
        sizes = [found["parts_gib"].get(part, 0) for found in known.values()]
        if any(sizes):
            table.add_row(part, *(f"{size:.2f}" if size else "" for size in sizes))
    table.add_section()
    for key, name in (("load_gib", "peak of loading"), ("step_gib", "peak of a step"), ("host_gib", "host, all ranks")):
        table.add_row(name, *(f"{found[key]:.2f}" for found in known.values()))
    table.add_row("fits", *("yes" if found["fits"] else f"no: {found['limit']}" for found in known.values()))
    return [table, *(line for engine in COLUMNS for line in _engine_report(plan, engine)), *_last_lines(plan)]


def _engine_report(plan: Mapping[str, Any], engine: str) -> list[str]:
    """Whether an engine fits, what limits it, and what to write."""
    found = plan["engines"][engine]
    name = COLUMNS[engine] + (" (this config)" if engine == plan["engine"] else "")
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
