"""fp32 master weights of bf16 parameters, in full fine-tuning, on engines that keep none: one process, DDP and FSDP2.

An AdamW update is about as large as the learning rate, and bf16 rounds away what is below 2⁻⁹ of a weight: at 5e-7 it
moves 2 weights in 100. DeepSpeed updates fp32 masters and rounds them into the weights that it computes with
(Micikevicius et al. 2017, arXiv 1710.03740, section 3.1); with these functions every engine does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from dpo_plugin.engines.config import EngineSettings
from dpo_plugin.errors import CheckpointError, ConfigError

FILE = "master_weights.safetensors"


def check_master_weights(wanted: bool, engine: EngineSettings) -> None:
    """Refuse ``master_weights: false`` where there is no way to do without them.

    Raises:
        ConfigError: Under DeepSpeed.
    """
    if engine.deepspeed and not wanted:
        raise ConfigError(
            f"`dpo_plugin.compute.master_weights: false` cannot be had under {engine.label}: DeepSpeed always updates "
            "fp32 master weights. Write: master_weights: true"
        )


def prepare_models(wanted: bool, accelerator: Any, model: nn.Module, ref_model: nn.Module | None) -> bool | None:
    """Decide whether bf16 weights get masters, before the engine takes over the model, and let it compute in bf16.

    axolotl 0.19 to 0.21 leaves embeddings, norms and head in fp32 in full fine-tuning on one process and DDP alone
    (loaders/model.py, _configure_embedding_dtypes), where what follows them is then fp32: another curve than that of
    engines that shard. They were loaded in bf16, so nothing is lost; what the model itself keeps in fp32 stays so.
    FSDP2 is left alone where it has not been told to compute in bf16 (``bf16: full``), since with fp32 weights it
    would compute in fp32.

    Returns:
        None where there is nothing to decide: nothing in bf16 is trained, or DeepSpeed has masters.
    """
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None or not _trained_bf16(model):
        return None
    if accelerator.is_fsdp2:
        policy = accelerator.state.fsdp_plugin.mixed_precision_policy
        return wanted and policy is not None and policy.param_dtype == torch.bfloat16
    for one in filter(None, (model, ref_model) if wanted else ()):
        fp32 = {
            *(getattr(one, "_keep_in_fp32_modules", None) or ()),
            *(getattr(one, "_keep_in_fp32_modules_strict", None) or ()),
        }
        for name, parameter in one.named_parameters():
            if parameter.dtype == torch.float32 and fp32.isdisjoint(name.split(".")):
                parameter.data = parameter.data.bfloat16()
    return wanted


def _trained_bf16(model: nn.Module) -> dict[str, nn.Parameter]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if p.requires_grad and p.dtype == torch.bfloat16}


# ── FSDP2: the sharded weights are fp32, and what it gathers from them is bf16 ──


def widen(model: nn.Module) -> frozenset[str]:
    """Make the trained bf16 weights fp32 before FSDP2 shards them; its mixed precision computes in bf16.

    accelerate 1.13 means to do so, and its upcast does nothing (accelerate 3979); 1.15's does the same as this
    (utils/fsdp_utils.py:820), which still says which weights are saved in bf16.

    Returns:
        Names of these weights.
    """
    trained = _trained_bf16(model)
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    return frozenset(trained)


def narrow(state: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
    """Round what `widen` has made fp32 into bf16, to be saved."""
    return {name: value.bfloat16() if name in names else value for name, value in state.items()}


# ── one process and DDP: the optimizer has copies ──


def add_master_weights(optimizer: Optimizer, model: nn.Module, warn: Callable[[str], None]) -> None:
    """Let an optimizer update fp32 copies of the trained bf16 weights, which each step is rounded into.

    The model does not change: gradients are accumulated, exchanged and clipped on its own parameters, and a step takes
    them as fp32. Parameter groups keep their settings; a second call does nothing. An optimizer that updates weights
    during backward, or has states already, is left as it is, with a warning.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    held = {id(parameter) for parameters in groups for parameter in parameters}
    weights: list[Any] = list(dict.fromkeys(_trained_bf16(model).values()))
    if all(id(getattr(weight, "master_weight", None)) in held for weight in weights):
        return
    if hasattr(optimizer, "fused_backward") or optimizer.state or any(id(weight) not in held for weight in weights):
        warn(
            f"dpo_plugin: {type(optimizer).__name__} updates the bf16 weights themselves, where small updates are "
            "rounded away: it does not take fp32 master weights. Write: optimizer: adamw_torch_fused"
        )
        return
    if hasattr(optimizer, "check_overrides"):
        optimizer.check_overrides()  # bitsandbytes finds by identity the embeddings whose states stay in 32 bits
    for weight in weights:
        weight.master_weight = nn.Parameter(weight.detach().float())
    for parameters in groups:
        parameters[:] = [getattr(parameter, "master_weight", parameter) for parameter in parameters]

    def hand_over_gradients(*_: Any) -> None:
        for weight in weights:
            if weight.grad is not None:
                weight.master_weight.grad, weight.grad = weight.grad.float(), None  # one at a time

    @torch.no_grad()
    def round_into_model(*_: Any) -> None:
        for weight in weights:
            weight.copy_(weight.master_weight)
            weight.master_weight.grad = None

    optimizer.register_step_pre_hook(hand_over_gradients)
    optimizer.register_step_post_hook(round_into_model)


def master_weight(parameter: nn.Parameter) -> Tensor:
    """The tensor that the optimizer updates for a parameter: its master weight of `add_master_weights`, or itself."""
    found: Tensor = getattr(parameter, "master_weight", parameter)
    return found.detach()


def save_master_weights(model: nn.Module, folder: Path) -> None:
    """Save the copies of `add_master_weights`, if there are any, by parameter name."""
    if masters := _masters(model):
        save_file({name: master.detach().cpu() for name, master in masters.items()}, folder / FILE)


@torch.no_grad()
def load_master_weights(model: nn.Module, folder: Path) -> None:
    """Restore the copies of `add_master_weights` from a checkpoint.

    Raises:
        CheckpointError: If they are not those of this model.
    """
    if not (masters := _masters(model)):
        return
    saved = load_file(folder / FILE) if (folder / FILE).is_file() else {}
    for name in sorted({*masters, *saved}):
        if name not in saved or name not in masters or saved[name].shape != masters[name].shape:
            raise CheckpointError(
                f"{folder / FILE} does not fit the trained weights: {name} is missing or has another shape. "
                "Write: resume_from_checkpoint: <another checkpoint>"
            )
        masters[name].copy_(saved[name])


def _masters(model: nn.Module) -> Mapping[str, Tensor]:
    return {name: p.master_weight for name, p in model.named_parameters() if hasattr(p, "master_weight")}
