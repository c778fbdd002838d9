"""How a 4-bit base gets onto the GPUs that ZeRO-3 or FSDP2 shards it over: whole, or layer by layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_plugin.engines.config import EngineSettings
from dpo_plugin.engines.ranks import check_ranks_agree, gather_object, patient_group
from dpo_plugin.errors import ConfigError
from dpo_plugin.model.cache import weights_digest
from dpo_plugin.model.quantised_copy import damage, digest_of, discard, is_there
from dpo_plugin.model.quantising import return_freed_memory


@dataclass(frozen=True)
class Loading:
    """Whether every rank maps a copy of the base in 4 bits and its engine takes it from there layer by layer.

    Attributes:
        asked: Whether the YAML asks for it, so that it is an error where it cannot be.
        blocker: Why the host loads the base in its own way, or None.
    """

    asked: bool
    blocker: str | None

    @property
    def sharded(self) -> bool:
        """Whether the base is loaded layer by layer."""
        return self.blocker is None

    @classmethod
    def choose(cls, wanted: str | None, cfg: Mapping[str, Any], engine: EngineSettings) -> Loading:
        """Decide by the config alone.

        Args:
            wanted: ``dpo_plugin.loading``.
            cfg: The raw YAML.
            engine: Of the run.

        Raises:
            ConfigError: For ``loading: sharded`` where it cannot be.
        """
        why = "`dpo_plugin.loading: host` asks for it" if wanted == "host" else _blocker(cfg, engine)
        if why and wanted == "sharded":
            raise ConfigError(f"`dpo_plugin.loading: sharded` is asked for, but {why}. Write: loading: host")
        return cls(wanted == "sharded", why)


def _blocker(cfg: Mapping[str, Any], engine: EngineSettings) -> str | None:
    """Why a base cannot be loaded layer by layer from a copy in 4 bits, as far as the config tells."""
    if not engine.shards_parameters:
        return f"{engine.label} keeps the whole base on each GPU"
    if cfg.get("adapter") != "qlora" or not cfg.get("load_in_4bit"):
        return "only a base in 4 bits is kept as a copy; the engine itself reads other bases in parts"
    backend = cfg.get("nf4_backend")
    if backend not in (None, "bitsandbytes"):
        return f"`nf4_backend: {backend}` does not store what it has quantised"
    reasons = {
        "qlora_sharded_model_loading": "the host loads the base in a way of its own",
        "quantize_moe_experts": "experts are quantised by the host, in a form that is not stored",
        "trust_remote_code": "the model's code is not the library's",
        "reinit_weights": "the weights are drawn anew in every run",
    }
    return next((f"`{key}: true`: {why}" for key, why in reasons.items() if cfg.get(key)), None)


def make_on_each_node(folder: Path, make: Callable[[], None], warn: Callable[[str], None]) -> None:
    """Make the copy where it is not, by one rank of all, then by one of each node that does not see it; all must call.

    Ranks of a node read a part of its files each, and a copy that is damaged is made once more.

    Args:
        folder: Of the copy.
        make: Makes it.
        warn: Gets a line about a copy that is damaged.

    Raises:
        ConfigError: On all ranks, if it cannot be made.
        RankMismatchError: On all ranks, if nodes have different copies.
    """
    local, ranks = int(os.environ.get("LOCAL_RANK") or 0), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    with patient_group() as group:
        for attempt in (1, 2):
            for makes in (os.environ.get("RANK", "0") == "0", local == 0):
                _together(make if makes and not is_there(folder) else None, group)
            damaged = [why for why in gather_object(damage(folder, local, ranks), group) if why]
            if not damaged:
                break
            if attempt == 2:
                raise ConfigError(
                    f"{folder} was made anew and is damaged again: {damaged[0]}. The disk cannot be relied on. "
                    "Write: dataset_prepared_path: <a folder on another disk>"
                )
            if local == 0:
                warn(f"dpo_plugin: {folder} is damaged, {damaged[0]}; the base is quantised again")
                discard(folder)
            gather_object(None, group)
        check_ranks_agree({"the base's copy in 4 bits": digest_of(folder)}, group)


def check_same_base(base: str, config: Any) -> None:
    """Check that all ranks see the same base, which each of them reads itself; all must call.

    Raises:
        RankMismatchError: On all ranks, if nodes have different ones.
    """
    folder = Path(base).expanduser()
    seen = weights_digest(folder) if folder.is_dir() else getattr(config, "_commit_hash", None)
    with patient_group() as group:
        check_ranks_agree({"base_model": seen}, group)


def _together(work: Callable[[], None] | None, group: Any) -> None:
    """Do work on some ranks while the others wait; a failure ends all."""
    failure: Exception | None = None
    try:
        if work is not None:
            work()
    except Exception as error:
        failure = error
    said = [one for one in gather_object(failure and f"{failure}", group) if one]
    if failure is not None:
        raise failure
    if said:
        raise ConfigError(said[0])


def partition_mapped(model: Any, accelerator: Any) -> None:
    """Let ZeRO-3 take a model that is mapped from a file one parameter at a time; all ranks must call.

    DeepSpeed's engine would move all of it onto the GPU first, and partition it there (0.19, runtime/engine.py:2094).
    A model that is partitioned already it does not cast, so what it would cast is cast here (:1861).
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None or not getattr(model, "is_mapped", False):
        return
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    config, device = plugin.hf_ds_config.config, torch.device(get_accelerator().current_device_name())
    modes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((modes[key] for key in modes if (config.get(key) or {}).get("enabled") is True), None)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    one: Any = None
    for parameter in model.parameters():
        wanted = dtype if dtype and parameter.is_floating_point() else parameter.dtype
        parameter.data = parameter.data.to(device, wanted, copy=True)  # rank 0's is written over it, not into a file
        if (state := getattr(parameter, "quant_state", None)) is not None:
            state.to(device)
        if one is None:
            one = parameter
            deepspeed.zero.Init(module=nn.ParameterList([one]), config_dict_or_path=config)
        else:
            one.convert_to_zero_parameters(param_list=[parameter])
        return_freed_memory()
