"""Values per parameter of a model and its adapters, counted on the meta device from the configuration alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from dpo_plugin.errors import ConfigError
from dpo_plugin.model.adapters import POLICY, REFERENCE, PolicyReferenceModel
from dpo_plugin.model.target_parameters import as_attached, as_list, check_present


@dataclass(frozen=True)
class Sizes:
    """Values per parameter.

    Attributes:
        linear: Weights that bitsandbytes quantises: every linear layer but the head, and experts if they are asked for.
        rows: Output features of all of them.
        other: The rest of the base model: embeddings, norms, biases, head.
        policy: The policy adapter; empty for full fine-tuning.
        reference: The reference adapter; empty if there is none.
        layers: Decoder layers.
        layer_linear: Values of one decoder layer that are in ``linear``.
        layer_other: The same in ``other``.
        layer_class: Name of the decoder layer's class.
        layer_experts: Values of one decoder layer's experts, if they are in ``linear``.
    """

    linear: tuple[int, ...]
    rows: int
    other: tuple[int, ...]
    policy: tuple[int, ...]
    reference: tuple[int, ...]
    layers: int
    layer_linear: int
    layer_other: int
    layer_class: str
    layer_experts: int = 0

    @property
    def trained(self) -> int:
        """Parameters that are trained: the policy adapter, or the whole model."""
        return sum(self.policy) or sum(self.linear) + sum(self.other)


def on_meta(config: Any, adapters: Mapping[str, LoraConfig], dtype: torch.dtype, trust: bool = False) -> Any:
    """Build the model with its adapters on the meta device.

    Args:
        config: A transformers config.
        adapters: LoRA settings of `POLICY` and perhaps of `REFERENCE`; empty for full fine-tuning.
        dtype: The base model's.
        trust: transformers' ``trust_remote_code``.

    Raises:
        ValueError: If transformers has no causal language model for the config, or LoRA does not fit it.
    """
    with init_empty_weights(include_buffers=True):  # else every tensor is allocated before it goes to meta
        # transformers writes the dtype into the config that it builds from
        base = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=trust)
    if not adapters:
        return base
    settings = {name: _as_attached(one, base) for name, one in adapters.items()}
    model = PolicyReferenceModel(base, settings[POLICY], adapter_name=POLICY, low_cpu_mem_usage=True)
    if REFERENCE in settings:
        model.add_adapter(REFERENCE, settings[REFERENCE], low_cpu_mem_usage=True)
    model.bind_switch()
    model.train_only_policy()
    return model


def count(base: Any, model: Any, four_bit_experts: bool = False) -> Sizes:
    """Count a base model and the adapters of ``model``, which is the same base with or without adapters.

    With ``four_bit_experts``, axolotl's ``quantize_moe_experts``, experts are quantised as linear layers are.
    """
    experts = {id(p) for p in _experts(base)} if four_bit_experts else set()
    quantised = experts | {id(module.weight) for module in quantisable(base)}
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))
    adapters = [] if model is base else [(f"{name}.", p.numel()) for name, p in model.adapter_parameters()]
    return Sizes(
        linear=tuple(p.numel() for p in base.parameters() if id(p) in quantised),
        rows=sum(p.numel() // p.shape[-1] for p in base.parameters() if id(p) in quantised),
        other=tuple(p.numel() for p in base.parameters() if id(p) not in quantised),
        policy=tuple(size for name, size in adapters if f".{POLICY}." in name),
        reference=tuple(size for name, size in adapters if f".{REFERENCE}." in name),
        layers=len(layers),
        layer_linear=sum(p.numel() for p in layers[-1].parameters() if id(p) in quantised),
        layer_other=sum(p.numel() for p in layers[-1].parameters() if id(p) not in quantised),
        layer_class=type(layers[-1]).__name__,
        layer_experts=sum(p.numel() for p in layers[-1].parameters() if id(p) in experts),
    )


def _experts(base: Any) -> list[nn.Parameter]:
    """The parameters that axolotl 0.19 to 0.21 takes for experts (monkeypatch/moe_quant.py)."""
    return [p for name, p in base.named_parameters() if p.ndim >= 3 and "expert" in name.lower()]


def quantisable(base: Any) -> list[Any]:
    """The modules that transformers replaces by bitsandbytes': all linear ones but the head and tied ones."""
    kept = set(get_keys_to_not_convert(base))
    return [m for name, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D) and name not in kept]


def check_targets(settings: LoraConfig, base: Any) -> None:
    """Check that every entry of ``lora_target_modules`` and ``lora_target_parameters`` names a module or parameter.

    Raises:
        ConfigError: Naming the entry and what there is.
    """
    attached = _as_attached(settings, base)
    check_present(attached.target_parameters, base)
    targets, names = attached.target_modules or [], [name for name, _ in base.named_modules()]
    if isinstance(targets, str):
        missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        missing = [one for one in sorted(targets) if not any(f".{name}".endswith(f".{one}") for name in names)]
    if missing:
        raise ConfigError(
            f"`lora_target_modules` has {missing[0]!r}, which the base model does not have. "
            f"Write: lora_target_modules: {as_list(_linear_names(base))}"
        )


def _as_attached(settings: LoraConfig, base: Any) -> LoraConfig:
    """Copy LoRA settings in the form that a run attaches; PEFT's "all-linear" takes in experts, axolotl's does not."""
    settings = copy.deepcopy(settings)
    if settings.target_modules == "all-linear":
        settings.target_modules = _linear_names(base)
    return as_attached(settings, base)


def _linear_names(base: Any) -> list[str]:
    """Last names of all linear layers but the head: what axolotl makes of ``lora_target_linear``."""
    head = base.get_output_embeddings()
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear) and module is not head}
    return sorted({name.rpartition(".")[2] for name in linear})
