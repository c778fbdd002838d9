"""Which axolotl command is running, and what ``lora_model_dir`` has to mean for it.

`lora_model_dir` names the SFT adapter. After training, though, ``axolotl merge-lora``, ``inference`` and ``evaluate``
on the same YAML are about the adapter in ``output_dir``; axolotl 0.19 prefers ``lora_model_dir``
(cli/merge_lora.py:178) and would merge the SFT adapter. tests/integration/test_host_commands.py holds each command.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import yaml

from dpo_plugin.errors import ConfigError
from dpo_plugin.host.log import LOG

USES_TRAINED_ADAPTER = ("merge-lora", "inference", "evaluate")

ENGINE_KEYS = (
    "deepspeed", "fsdp", "fsdp_config", "fsdp_version", "tensor_parallel_size", "context_parallel_size",
    "sequence_parallel_degree", "dp_shard_size", "dp_replicate_size",
)  # fmt: skip
"""What splits a model over ranks."""


def running_command(cfg: Any) -> str:
    """``merge-lora``, ``inference``, ``evaluate`` or ``train``, from the config's flags and the started program."""
    if cfg.get("merge_lora"):
        return "merge-lora"
    if cfg.get("inference"):
        return "inference"
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    for command in USES_TRAINED_ADAPTER:
        if spec is not None and spec.name == f"axolotl.cli.{command.replace('-', '_')}":
            return command
    called_as_axolotl = Path(sys.argv[0]).name in ("axolotl", "axolotl.exe") and len(sys.argv) > 1
    return sys.argv[1] if called_as_axolotl and sys.argv[1] in USES_TRAINED_ADAPTER else "train"


def leave_out_engine(cfg: Any) -> None:
    """Let a command that runs on one process load the model whole, whatever the config trains with.

    ``axolotl merge-lora`` of axolotl 0.19 reads the config once before it takes ``deepspeed`` out of it
    (cli/merge_lora.py:149), and DeepSpeed then waits for other ranks.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        for key in ENGINE_KEYS:
            cfg.pop(key, None)


def intended_rl(cfg: Any) -> str:
    """``rl`` as the YAML says; ``axolotl inference`` removes it from the config that plugins see."""
    path = cfg.get("axolotl_config_path")
    if cfg.get("rl") is None and cfg.get("inference") and path and Path(path).is_file():
        return str((yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}).get("rl"))
    return str(cfg.get("rl"))


def use_trained_adapter(cfg: Any, command: str) -> None:
    """Point ``lora_model_dir`` at the DPO adapter in ``output_dir``, unless ``--lora-model-dir`` was given.

    Raises:
        ConfigError: If there is none.
    """
    named = any(word.split("=")[0].replace("_", "-") == "--lora-model-dir" for word in sys.argv)
    if named or not cfg.get("adapter"):
        return
    trained = Path(str(cfg.get("output_dir")))
    if not (trained / "adapter_config.json").is_file():
        raise ConfigError(
            f"`axolotl {command}` needs the DPO adapter, and `output_dir: {trained}` holds none. Train first, or name "
            "an adapter: --lora-model-dir <folder>"
        )
    LOG.info(f"dpo_plugin: {command} uses the DPO adapter in {trained}, not lora_model_dir {cfg.get('lora_model_dir')}")
    if command == "merge-lora" and (cfg.get("adapter") == "qlora" or cfg.get("load_in_4bit")):
        LOG.info(
            "dpo_plugin: the adapter was trained on an NF4 base; axolotl merges it into the base's weights after their "
            "NF4 round trip, and saves them in the base model's own precision"
        )
    cfg["lora_model_dir"] = str(trained)
