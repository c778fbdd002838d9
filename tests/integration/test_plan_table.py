"""The table of docs/plan.md that says on which nodes Qwen2.5-72B fits: planned, and validated by the host."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_plugin.config import parse_config
from dpo_plugin.plan.planner import GIB, Machine, Planner
from tests.integration.test_recipes import adapter_for, validated
from tests.support import bases
from tests.support.tiny import ROOT

NODES = {
    "1 × 80 GB": (1, 79), "1 × 48 GB": (1, 47.5), "2 × 48 GB": (2, 47.5), "4 × 24 GB": (4, 23.5), "8 × 24 GB": (8, 23.5)
}  # fmt: skip
"""Heading → GPUs, and GiB of each."""
HOST = 128 * GIB

ENGINES = {
    "DDP": ("qwen72b-dpo", {"deepspeed": None}),
    "ZeRO-3": ("qwen72b-dpo", {}),
    "ZeRO-3, `zero3_bf16_offload.json`": (
        "qwen72b-dpo",
        {"deepspeed": "deepspeed_configs/zero3_bf16_offload.json"},
    ),
    "FSDP2": ("qwen72b-dpo-fsdp", {}),
    "FSDP2, `offload_params: true`": ("qwen72b-dpo-fsdp", {"fsdp_config": {"offload_params": True}}),
}
"""Engine → the recipe it is in, and what is changed there."""
TOKENS = {"`max_tokens: 2048`": {"dpo_plugin": {"compute": {"max_tokens": 2048}}}}
FEWER = {"`checkpoint_layers: 72`": {"dpo_plugin": {"compute": {"checkpoint_layers": 72}}}}


def narrow(optimizer: str) -> dict[str, dict[str, Any]]:
    return {f"`{optimizer}`": {"optimizer": optimizer}}


def both(optimizer: str) -> dict[str, dict[str, Any]]:
    (tokens, one), (states, other) = *TOKENS.items(), *narrow(optimizer).items()
    return {f"{states} and {tokens}": {**one, **other}}


AS_IT_IS: dict[str, dict[str, Any]] = {"as it is": {}}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "DDP": {**AS_IT_IS, **TOKENS, **narrow("adamw_8bit"), **both("adamw_8bit")},
    "ZeRO-3": {**AS_IT_IS, **TOKENS, **narrow("adamw_8bit"), **FEWER},
    "ZeRO-3, `zero3_bf16_offload.json`": {**AS_IT_IS, **TOKENS},
    "FSDP2": {**AS_IT_IS, **TOKENS, **narrow("adamw_torch_8bit"), **FEWER},
    "FSDP2, `offload_params: true`": {**AS_IT_IS, **TOKENS},
}
"""Engine → what is written besides, under the name it has in the table."""
ROWS = [(engine, variant) for engine, variants in VARIANTS.items() for variant in variants]


def config(engine: str, variant: str) -> dict[str, Any]:
    recipe, more = ENGINES[engine]
    raw = yaml.safe_load((ROOT / f"recipes/{recipe}.yaml").read_text(encoding="utf-8"))
    fsdp = {"fsdp_config": {**raw["fsdp_config"], **more["fsdp_config"]}} if "fsdp_config" in more else {}
    return {key: value for key, value in {**raw, **more, **fsdp, **VARIANTS[engine][variant]}.items() if value}


def entry(planner: Planner, cfg: dict[str, Any], gpus: int, memory: float) -> str:
    """Peaks of loading and of a step, bold where both fit."""
    planner.machine = Machine(gpus, round(memory * GIB), HOST)
    need = planner.need(planner.used, cfg)
    peaks = f"{need.load / GIB:.1f} / {need.step / GIB:.1f}"
    return peaks if need.limit(planner.machine) else f"**{peaks}**"


def table(base: Path) -> str:
    """Plan every row on every node; ``base`` is a folder with the base's config.json."""
    lines = [f"| | | {' | '.join(NODES)} |", f"|---|---|{'---|' * len(NODES)}"]
    for engine, variants in VARIANTS.items():
        planner = Planner({**config(engine, "as it is"), "base_model": str(base)}, engine, Machine(1, GIB, HOST))
        for variant in variants:
            cfg = {**config(engine, variant), "base_model": str(base)}
            planner.compute = parse_config(cfg.get("dpo_plugin")).compute
            entries = (entry(planner, cfg, *node) for node in NODES.values())
            lines.append(f"| {engine} | {variant} | {' | '.join(entries)} |")
    return "\n".join(lines)


@pytest.mark.slow
def test_the_table_is_what_the_plan_says(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "config.json").write_text(json.dumps(bases.QWEN72B), encoding="utf-8")
    assert table(tmp_path) in (ROOT / "docs/plan.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("engine", "variant"), ROWS)
def test_every_row_is_a_config_that_the_host_takes(engine, variant, base_dir, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config(engine, variant)), encoding="utf-8")
    cfg = validated(recipe, adapter_for(recipe, base_dir, tmp_path / "sft"), monkeypatch)
    assert cfg.trainer_cls == "dpo_plugin.host.trainer.PreferenceTrainer"
