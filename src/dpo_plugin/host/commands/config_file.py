"""Reading an axolotl config for commands, most of which load no model and need no GPU."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import normalize_cfg_datasets, normalize_config, validate_config
from axolotl.utils.dict import DictDefault

from dpo_plugin.errors import ConfigError
from dpo_plugin.host.commands.running import ENGINE_KEYS
from dpo_plugin.host.plugin import DPOPlugin
from dpo_plugin.host.settings import RunSettings

_ANY_MACHINE = (
    {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"},
    {"torch_version": str(torch.__version__).split("+")[0]},
)
"""A config is read for the machine that it will run on, not for this one."""


def load_config(raw: Mapping[str, Any], machine: tuple[Any, Any] = _ANY_MACHINE) -> tuple[Any, RunSettings]:
    """The validated config and our settings, without the host's log of it; `machine` is its ``gpu_capabilities()``.

    Raises:
        ConfigError: If the config does not use dpo_plugin for DPO.
    """
    for handler in logging.getLogger("axolotl").handlers:  # not the loggers, which all have a level of their own
        handler.setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    raw = DictDefault(raw)
    PluginManager.get_instance().plugins.clear()
    prepare_plugins(raw)
    settings = DPOPlugin.active().run_settings()
    cfg = validate_config(raw, *machine)
    normalize_config(cfg)
    normalize_cfg_datasets(cfg)
    return cfg, settings


_LEFT_OUT = (
    *ENGINE_KEYS, "use_wandb", "wandb_project", "use_mlflow", "use_comet", "use_trackio", "use_tensorboard",
    "resume_from_checkpoint", "auto_resume_from_checkpoints",
)  # fmt: skip


def on_one_process(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what splits the model over ranks, and what would log anywhere."""
    kept = {key: value for key, value in raw.items() if key not in _LEFT_OUT}
    section = kept.get("dpo_plugin")
    if isinstance(section, dict):
        kept["dpo_plugin"] = {key: value for key, value in section.items() if key != "loading"}  # it is about engines
    return kept


def trained_folder(raw: Mapping[str, Any], checkpoint: str | None) -> Path | None:
    """The folder of the trained policy: the checkpoint that is named, else ``output_dir``; None if nothing is there.

    Raises:
        ConfigError: If the checkpoint that is named is none.
    """
    folder = Path(checkpoint or str(raw.get("output_dir"))).expanduser()
    file = "adapter_config.json" if raw.get("adapter") else "config.json"
    if (folder / file).is_file():
        return folder
    if checkpoint:
        raise ConfigError(f"`--checkpoint {checkpoint}` holds no {file}. Write: --checkpoint <folder>")
    return None
