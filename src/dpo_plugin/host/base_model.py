"""The base model: what its config shows before its weights are read, and how they are loaded."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from axolotl.loaders.utils import load_model_config
from axolotl.utils.distributed import init_distributed_state

from dpo_plugin.compute.attention import prefix_sharing_blocker
from dpo_plugin.engines.loading import check_same_base, make_on_each_node
from dpo_plugin.errors import ConfigError
from dpo_plugin.host.log import LOG
from dpo_plugin.host.settings import RunSettings
from dpo_plugin.model.quantised_copy import folder_of, identity, manifest_of, weight_files, write
from dpo_plugin.model.quantising import staying_on_host
from dpo_plugin.model.target_parameters import check_expert_count

DEQUANTIZE = "model_quantization_config: Mxfp4Config, model_quantization_config_kwargs: {dequantize: true}"


def check_base(cfg: Any, settings: RunSettings) -> None:
    """Refuse what cannot be trained on a base model, and say once that one which sees gets no images.

    Args:
        cfg: The host's config after its validation.
        settings: Of the run.

    Raises:
        AdapterError: For an adapter on another number of experts.
        ConfigError: For a base whose config cannot be read, for one in MXFP4 that is not dequantised, and for
            ``prefix_sharing: true`` on one whose layers hand on a state.
    """
    key = "base_model_config" if cfg.base_model_config else "base_model"
    try:
        config = load_model_config(cfg)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`{key}: {cfg[key]}` cannot be used: {' '.join(str(error).split())[:200]}. "
            f"Write: {key}: <a folder with config.json, or a name on the hub>"
        ) from error
    _check_quantisation(cfg, config)
    for adapter in filter(None, (settings.policy, settings.reference.adapter)):
        check_expert_count(adapter.config, adapter.key, adapter.path, config)
    why = prefix_sharing_blocker(config)
    if why and settings.config.compute.prefix_sharing is True:
        raise ConfigError(f"{why}, but `dpo_plugin.compute.prefix_sharing: true` asks for it. Write: auto")
    if cfg.is_multimodal and os.environ.get("RANK", "0") == "0":
        LOG.info(
            f"dpo_plugin: the base model ({config.model_type}) is trained on text alone: no images are used, and its "
            "parts that see stay as they are"
        )


def _check_quantisation(cfg: Any, config: Any) -> None:
    """Refuse weights that stay packed in MXFP4: transformers 5.16 to 5.20 has no backward for them.

    Its quantizer says so (quantizers/quantizer_mxfp4.py, ``is_trainable``), after the weights are read.
    """
    found = getattr(config, "quantization_config", None) or {}
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    if method != "mxfp4":
        return
    if cfg.load_in_4bit or cfg.load_in_8bit:
        key = "load_in_4bit" if cfg.load_in_4bit else "load_in_8bit"
        raise ConfigError(
            f"`{key}: true` cannot quantise `base_model: {cfg.base_model}`, whose experts are in MXFP4 already. "
            f"Write: adapter: lora, {key}: false, {DEQUANTIZE}"
        )
    if cfg.model_quantization_config != "Mxfp4Config" or not (cfg.model_quantization_config_kwargs or {}).get(
        "dequantize"
    ):
        raise ConfigError(
            f"the experts of `base_model: {cfg.base_model}` are in MXFP4, which has no backward and cannot carry LoRA. "
            f"Write: {DEQUANTIZE}"
        )


# ── how it is loaded ──


@dataclass(frozen=True)
class Planned:
    """Bytes of the base in 4 bits, and of a GPU at most while it is loaded."""

    copy: int
    peak: int


def plan_loading(cfg: Any, settings: RunSettings) -> Planned | None:
    """Plan a base that is loaded in parts, on one rank of a node; None where it is not, or cannot be planned.

    To be called before the host enables ZeRO-3, under which a model that is only to be counted would be partitioned.
    """
    if not settings.loading.sharded or int(os.environ.get("LOCAL_RANK") or 0):
        return None
    from dpo_plugin.plan.planner import Planner, this_machine

    try:
        planner = Planner(cfg, "this config", this_machine(), settings.config, settings.engine)
        return Planned(planner.base_bytes(), planner.load_peak())
    except Exception as error:  # the log then lacks a figure, which must not end the run
        LOG.info(f"dpo_plugin: what loading takes is not known: {error}")
        return None


def load(loader: Any, theirs: Callable[[], Any], settings: RunSettings, planned: Planned | None) -> Any:
    """Load the base: mapped from a copy in 4 bits on disk where ZeRO-3 or FSDP2 shards it, else as the host does.

    All ranks must call.

    Args:
        loader: The host's, with what it passes to transformers.
        theirs: Loads as the loader says.
        settings: Of the run.
        planned: Of `plan_loading`.

    Raises:
        ConfigError: If the copy cannot be made, or ``loading: sharded`` is asked for and cannot be.
    """
    if not settings.engine.shards_parameters or not loader.cfg.load_in_4bit:
        return theirs()
    stored = getattr(loader.model_config, "quantization_config", None)
    files = weight_files(loader.base_model, loader.cfg.revision_of_model)
    if why := settings.loading.blocker or _cannot_be_mapped(loader, stored, files):
        if settings.loading.asked:
            raise ConfigError(f"`dpo_plugin.loading: sharded` is asked for, but {why}. Write: loading: host")
        LOG.info(f"dpo_plugin: each GPU holds the whole base in 4 bits before it is sharded, because {why}")
        return theirs()
    loader.cfg.embeddings_skip_upcast = True  # to fp32 and back would take each of them into the host's memory
    init_distributed_state()
    if stored:
        check_same_base(loader.base_model, loader.model_config)
        return _map(loader, theirs, loader.base_model, None)
    made_of = identity(
        files,
        quantisation=loader.model_kwargs["quantization_config"].to_dict(),
        dtype=str(loader.cfg.torch_dtype),
        loader=loader.auto_model_loader.__name__,
        versions={name: version(name) for name in ("bitsandbytes", "transformers")},
    )
    root = Path(loader.cfg.dataset_prepared_path or "last_run_prepared") / "bases"
    folder = folder_of(root, loader.base_model, made_of)
    made_of["base"] = loader.base_model

    def make() -> None:
        size = planned.copy if planned else sum(file.stat().st_size for file in files)
        LOG.info(f"dpo_plugin: the base is quantised once, into {folder}, {size / 2**30:.1f} GiB")
        write(folder, theirs, made_of, size)

    make_on_each_node(folder, make, LOG.warning)
    peak = f"; each GPU holds at most {planned.peak / 2**30:.1f} GiB meanwhile" if planned else ""
    LOG.info(f"dpo_plugin: the base is loaded layer by layer from its copy in 4 bits, {folder}{peak}")
    return _map(loader, theirs, str(folder), manifest_of(folder)["weights"])


def _cannot_be_mapped(loader: Any, stored: Any, files: list[Path]) -> str | None:
    """Why a copy of the base in 4 bits cannot be made, or read as it was written."""
    stored = stored if stored is None or isinstance(stored, dict) else stored.to_dict()
    if stored and not (stored.get("quant_method") == "bitsandbytes" and stored.get("load_in_4bit")):
        return f"its weights are stored by {stored.get('quant_method')}"
    if not files:
        return f"`base_model: {loader.base_model}` has no safetensors"
    quantisation = stored or loader.model_kwargs["quantization_config"].to_dict()
    kind = str(quantisation.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    computed = str(loader.cfg.torch_dtype).removeprefix("torch.")
    if getattr(torch, kind).is_floating_point and kind != computed:
        return f"`bnb_4bit_quant_storage: {kind}` would be read as {computed}, in which the run computes"
    return None


def _map(loader: Any, theirs: Callable[[], Any], source: str, noted: str | None) -> Any:
    """Load a checkpoint in 4 bits so that its weights stay in the file's pages; the model says it is the base."""
    base, config, kwargs = loader.base_model, loader.model_config, loader.model_kwargs
    quantisation = kwargs.get("quantization_config")
    loader.base_model, loader.model_config = source, copy.deepcopy(config)
    if quantisation is not None:
        loader.model_config.quantization_config = quantisation.to_dict()
    left_out = ("device_map", *(("quantization_config", "revision") if source != base else ()))
    loader.model_kwargs = {key: value for key, value in kwargs.items() if key not in left_out}
    try:
        with staying_on_host():
            model = theirs()
    finally:
        loader.base_model, loader.model_config, loader.model_kwargs = base, config, kwargs
    model.name_or_path = model.config.name_or_path = base
    model.is_mapped, model.weights_digest = True, noted
    return model
