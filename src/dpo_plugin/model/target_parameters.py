"""LoRA on parameters that are not modules, ``target_parameters``: the experts of a mixture, one tensor for all of them.

PEFT 0.20 to 0.21 wraps the module that owns such a parameter in a ``ParamWrapper``, one inside the other where it owns
several, and adds the product of A and B to the weight while the module runs (tuners/lora/layer.py). Adapters on one
base share the wrappers, for which they must name the same parameters (peft 3350).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import safe_open
from torch import Tensor, nn

from dpo_plugin.errors import AdapterError, ConfigError

_NEED_A_MODULE = ("use_dora", "lora_bias", "alora_invocation_tokens", "velora_config", "kasa_config")
_READ_A_WEIGHT = ("orthogonal", "mica")
"""Settings and values of ``init_lora_weights`` that PEFT refuses on a parameter, or fails with."""


def as_list(names: Iterable[str]) -> str:
    """Write names as a YAML list."""
    return f"[{', '.join(names)}]"


def as_attached(settings: LoraConfig, base: nn.Module) -> LoraConfig:
    """Make of LoRA settings what PEFT makes of them on this base, in place.

    PEFT takes per-expert modules of transformers 4 (``gate_proj``) for the parameters that transformers 5 has made of
    them. It refuses ``lora_dropout`` on parameters, which axolotl works around for SFT alone (loaders/adapter.py); DPO
    runs without dropout, so that 0 is what they train with, and what PEFT can load again.

    Raises:
        ValueError: If PEFT cannot convert them.
    """
    convert_peft_config_for_transformers(settings, base, None)
    if settings.target_parameters:
        settings.lora_dropout = 0.0
    return settings


@contextmanager
def whole_shapes() -> Iterator[None]:
    """Context in which PEFT can put adapters on parameters that ZeRO-3 has partitioned as they were loaded.

    PEFT 0.20 sizes the LoRA by ``parameter.shape`` (tuners/lora/layer.py, ``_get_in_out_features``), which is ``[0]``
    under ``zero.Init``, and ends in "tuple index out of range"; 0.21 reads ``ds_shape``. One value seen in the whole
    shape stands in; no weight is gathered. tests/unit/model/test_target_parameters.py says which PEFT needs it.
    """
    theirs = ParamWrapper.get_param

    def get_param(self: Any) -> Tensor:
        parameter: Tensor = theirs(self)
        whole = getattr(parameter, "ds_shape", parameter.shape)
        return parameter if parameter.shape == whole else parameter.new_empty(1).expand(whole)

    ParamWrapper.get_param = get_param
    try:
        yield
    finally:
        ParamWrapper.get_param = theirs


def check_saved_parameters(config: Mapping[str, Any], key: str, folder: Any) -> None:
    """Check that an adapter on parameters is one that PEFT can load.

    Raises:
        AdapterError: Naming the setting.
    """
    if not config.get("target_parameters"):
        return
    found = [name for name in _NEED_A_MODULE if config.get(name)]
    found += ["init_lora_weights"] if config.get("init_lora_weights") in _READ_A_WEIGHT else []
    if found:
        raise AdapterError(
            f"`{key}: {folder}` has target_parameters and `{found[0]}: {config[found[0]]}`, which PEFT does not load "
            "together. Save the adapter again."
        )


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""How configs of transformers 5 name the number of experts of a layer; many know the first as a second name."""


def check_expert_count(config: Mapping[str, Any], key: str, folder: Path, base: Any) -> None:
    """Check by its tensors' shapes that an adapter was trained on as many experts as the base model has.

    Args:
        config: Its ``adapter_config.json``.
        key: The YAML key that names it.
        folder: Its folder.
        base: transformers' config of the base model.

    Raises:
        AdapterError: Naming both shapes, or both numbers where each expert has a LoRA of its own.
    """
    file, text = folder / "adapter_model.safetensors", base.get_text_config()
    has = next(((name, n) for name in _EXPERTS if isinstance(n := getattr(text, name, None), int)), None)
    if has is None or not file.is_file():
        return
    with safe_open(file, framework="pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    if (found := _other_experts(shapes, config, has[1])) is None:
        return
    trained_on = config.get("base_model_name_or_path")
    raise AdapterError(
        f"`{key}: {folder}` {found}, and the base model has `{has[0]}: {has[1]}`. It was trained on {trained_on}. "
        f"Write: base_model: {trained_on}"
    )


def _other_experts(shapes: Mapping[str, list[int]], config: Mapping[str, Any], experts: int) -> str | None:
    """What an adapter's shapes say of its experts, if there are not so many; None also where ranks differ."""
    numbers = [int(one[1]) for name in shapes if (one := re.search(r"\.experts\.(\d+)\.", name))]
    if numbers and (found := max(numbers) + 1) != experts:
        return f"has a LoRA for each of {found} experts"
    rank = int(config["r"])
    for name, (rows, inside) in ((n, s) for n, s in shapes.items() if _ON_EXPERTS.search(n)):
        if rows != rank * experts and not config.get("rank_pattern"):
            return (
                f"is on {rows // rank} experts: {name} is ({rows}, {inside}), of rank {rank}, where {experts} experts "
                f"make it ({rank * experts}, {inside})"
            )
    return None


_ON_EXPERTS = re.compile(r"\.experts(\.base_layer)*\.lora_A\.weight$")


def check_fresh_parameters(cfg: Mapping[str, Any]) -> None:
    """Check the YAML of a fresh LoRA on parameters; the host checks ``lora_dropout``.

    Raises:
        ConfigError: If PEFT would refuse a key, or not apply it.
    """
    if not (names := cfg.get("lora_target_parameters")):
        return
    init, layers = cfg.get("peft_init_lora_weights"), cfg.get("peft_layers_to_transform")
    if cfg.get("peft_use_dora"):
        raise ConfigError(
            "`peft_use_dora: true` is not possible on the parameters of `lora_target_parameters`. "
            "Write: peft_use_dora: false"
        )
    if init in _READ_A_WEIGHT:
        raise ConfigError(
            f"`peft_init_lora_weights: {init}` reads the weight of a module, and `lora_target_parameters` have none. "
            "Write: peft_init_lora_weights: null"
        )
    if layers:
        numbers = layers if isinstance(layers, list) else [layers]
        chosen = [f"layers.{number}.{name}" for number in numbers for name in names]
        raise ConfigError(
            f"`peft_layers_to_transform: {layers}` does not choose among `lora_target_parameters`: PEFT would train "
            f"those of all layers. Write: lora_target_parameters: {as_list(chosen)}, without peft_layers_to_transform"
        )


def check_present(names: Iterable[str] | None, base: nn.Module) -> None:
    """Check that every entry of ``lora_target_parameters`` names a parameter; PEFT skips others without a word.

    Raises:
        ConfigError: Naming the entry and what there is.
    """
    owners = [(f".{path}", _own_parameters(module)) for path, module in base.named_modules()]
    for entry in names or ():
        owner, _, name = entry.rpartition(".")
        if any(name in own and path.endswith(f".{owner}" if owner else "") for path, own in owners):
            continue
        found = {
            ".".join([*path.split(".")[-2:], one]) for path, own in owners for one, ndim in own.items() if ndim == 3
        }
        line = as_list(sorted(found)) if found else "null"
        raise ConfigError(
            f"`lora_target_parameters` has {entry!r}, which the base model does not have. "
            f"Write: lora_target_parameters: {line}"
        )


def _own_parameters(module: nn.Module) -> dict[str, int]:
    """Names and dimensions of a module's own parameters, parametrised ones (4-bit experts) included."""
    found = {
        name: len(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in module.named_parameters(recurse=False)
    }
    return found | dict.fromkeys(getattr(module, "parametrizations", ()), 3)
