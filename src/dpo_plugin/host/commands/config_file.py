"""Reading an axolotl config for commands that load no model and need no GPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import torch
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import normalize_cfg_datasets, normalize_config, validate_config
from axolotl.utils.dict import DictDefault

from dpo_plugin.host.plugin import DPOPlugin
from dpo_plugin.host.settings import RunSettings
from dpo_plugin.host.yaml_keys import read_yaml

# The config is read for the machine it will run on, not for this one.
_CAPABILITIES = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}


def _quiet() -> None:
    """Show warnings only; the host's loggers all have a level of their own, so their handlers are set."""
    for handler in logging.getLogger("axolotl").handlers:
        handler.setLevel(logging.WARNING)
    datasets.disable_progress_bars()


def read_config(path: str | Path) -> tuple[Any, RunSettings]:
    """The validated config and our settings, without the host's log of the whole config.

    Raises:
        ConfigError: If the config does not use dpo_plugin for DPO.
    """
    _quiet()
    raw = DictDefault(read_yaml(path))
    PluginManager.get_instance().plugins.clear()
    prepare_plugins(raw)
    settings = DPOPlugin.active().run_settings()
    cfg = validate_config(raw, _CAPABILITIES, {"torch_version": str(torch.__version__).split("+")[0]})
    normalize_config(cfg)
    normalize_cfg_datasets(cfg)
    return cfg, settings
