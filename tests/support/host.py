"""Run axolotl in this process as ``axolotl train`` does, and keep hold of the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass
class Run:
    """A finished run."""

    output_dir: Path
    trainer: Any

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [line for line in self.trainer.state.log_history if "loss" in line]


def load_config(config: dict[str, Any], folder: Path) -> Any:
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().plugins.clear()
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return load_cfg(str(file))


def validated(config: dict[str, Any]) -> Any:
    """A config after the host's validator, as on a node with 8 GPUs; its paths are relative to the current folder."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    raw = DictDefault(config)
    PluginManager.get_instance().plugins.clear()
    prepare_plugins(raw)
    capabilities = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}
    return validate_config(raw, capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"})


def train(config: dict[str, Any], folder: Path) -> Run:
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.integrations.base import PluginManager
    from axolotl.train import train as axolotl_train

    folder.mkdir(parents=True, exist_ok=True)
    cfg = load_config(config, folder)
    load = load_preference_datasets if cfg.rl else load_datasets
    data = PluginManager.get_instance().load_datasets(cfg, preprocess=False) or load(cfg=cfg)
    _, _, trainer = axolotl_train(cfg=cfg, dataset_meta=data)
    return Run(Path(cfg.output_dir), trainer)
