"""Buffers that a model computes with and no file holds, rotary frequencies above all: fp32 on every engine."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_plugin.errors import ConfigError

TOLERANCE = 1e-5
"""Largest relative difference to a fresh buffer: a few fp32 roundings; one bf16 rounding is 4e-3."""


@torch.no_grad()
def fresh_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Recompute from its config the buffers that are not saved with a transformers model, wrapped or not.

    They are computed by transformers' own ``_init_weights``, on copies of the modules that share nothing with them.

    Yields:
        The module, the buffer's name in it, and its value: fp32, on the CPU.
    """
    for owner, module in _with_owners(model, None):
        names = [name for name, buffer in module.named_buffers(recurse=False) if _computed(module, name, buffer)]
        if owner is None or not names:
            continue
        twin = copy.copy(module)
        twin._parameters = {name: _on_meta(parameter) for name, parameter in module._parameters.items()}
        twin._buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
        for name in names:
            twin._buffers[name] = torch.full(module.get_buffer(name).shape, math.nan, device="cpu", dtype=torch.float32)
        owner._init_weights(twin)
        yield from ((module, name, value) for name in names if not (value := twin.get_buffer(name)).isnan().any())


def _with_owners(
    module: nn.Module, owner: PreTrainedModel | None
) -> Iterator[tuple[PreTrainedModel | None, nn.Module]]:
    """Each module with the innermost transformers model that it is in."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    yield owner, module
    for child in module.children():
        yield from _with_owners(child, owner)


def _computed(module: nn.Module, name: str, buffer: Tensor) -> bool:
    return name in module._non_persistent_buffers_set and buffer.is_floating_point()


def _on_meta(parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Return a stand-in that costs nothing to initialise, with the shape that ZeRO-3 has taken from a parameter."""
    if parameter is None:
        return None
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


class ComputedBuffers:
    """The fp32 buffers that a model is to compute with, whatever an engine makes of them.

    DeepSpeed casts a 16-bit model's buffers: ZeRO-3 as the modules are made (zero.Init), and 0.18 again for all
    of it (runtime/engine.py:1463). Among them are the rotary frequencies, whose angles are then off by up to 2.4
    radians at position 2048 of Qwen2.5: another model than the one that SFT trained and that is served.

    Args:
        model: The model before an engine has it; its computed buffers are set to fresh ones.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        kept = {
            (module, name): buffer.detach().clone()
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.dtype == torch.float32
        }
        self._kept = {**kept, **{(module, name): value for module, name, value in fresh_buffers(model)}}
        self.restore()

    def restore(self, *_: object) -> None:
        """Put back each buffer that has another dtype than it should; can be a module's forward pre-hook."""
        for (module, name), value in self._kept.items():
            now = module.get_buffer(name)
            if now.dtype != value.dtype:
                module._buffers[name] = value.to(now.device)

    def check(self) -> None:
        """Compare the computed buffers with freshly made ones.

        Raises:
            ConfigError: If one differs, or if rotary frequencies are of 16 bits and cannot be computed here.
        """
        names = {module: name for name, module in self.model.named_modules()}
        fresh = {(module, name): value for module, name, value in fresh_buffers(self.model)}
        for (module, name), value in fresh.items():
            now = module.get_buffer(name).cpu()
            if now.dtype.itemsize < 4 or not torch.allclose(now.to(value.dtype), value, rtol=TOLERANCE, atol=0):
                raise ConfigError(
                    f"`{names[module]}.{name}` is not what the model's config says before the first step: it begins "
                    f"{now.flatten()[:3].tolist()}, not {value.flatten()[:3].tolist()}. Another plugin or a patch has "
                    "changed it. Write: plugins: [dpo_plugin.DPOPlugin]"
                )
        for module, where in names.items():
            for name, buffer in module.named_buffers(recurse=False):
                if "inv_freq" in name and buffer.dtype.itemsize < 4 and (module, name) not in fresh:
                    raise ConfigError(
                        f"`{where}.{name}` has been rounded to {buffer.dtype}, and transformers does not say how to "
                        "recompute it: positions would be off. Write: deepspeed: <a config of ZeRO stage 2>"
                    )
