"""The reference that follows the policy: TR-DPO on adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dpo_plugin.config import ReferenceConfig
from dpo_plugin.errors import CheckpointError, ConfigError
from dpo_plugin.model.adapter_config import AdapterFolder, adapter_settings
from dpo_plugin.model.adapters import POLICY, REFERENCE
from dpo_plugin.model.references import AdapterReference


class EmaReference(AdapterReference):
    """TR-DPO's soft update (Gorbatovski et al. 2024, arXiv 2404.09656): reference ← α·policy + (1−α)·reference."""

    moves = True

    def __init__(self, policy: Any, ref_model: Any | None = None, options: ReferenceConfig | None = None):
        super().__init__(policy, ref_model, options)
        mine, theirs = ({n.replace(f".{of}", "."): p.shape for n, p in self._of(of)} for of in (POLICY, REFERENCE))
        settings = [adapter_settings(policy.peft_config[name].to_dict()) for name in (POLICY, REFERENCE)]
        if mine != theirs or settings[0] != settings[1]:
            differing = sorted({name for name, _ in mine.items() ^ theirs.items()}) or _differing(*settings)
            raise ConfigError(
                _CANNOT_MIX.format(f"{differing[0]} differs", "adapter_dir: <an adapter of the policy's shape>")
            )
        # As attached; an engine that casts the model makes new tensors, and these stay fp32.
        self._masters = {name: reference.data.float() for name, reference, _ in self._pairs()}

    @classmethod
    def check_adapters(cls, policy: AdapterFolder | None, reference: AdapterFolder | None) -> None:
        """Refuse adapters whose configs show that one cannot be mixed into the other."""
        if policy is None or reference is None:
            return
        mine, theirs = adapter_settings(policy.config), adapter_settings(reference.config)
        if differing := _differing(mine, theirs):
            name = differing[0]
            found = f"`{name}` is {mine.get(name)} in {policy.path} and {theirs.get(name)} in {reference.path}"
            raise ConfigError(_CANNOT_MIX.format(found, f"adapter_dir: {policy.path}"))

    def _of(self, adapter: str) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.policy.adapter_parameters() if f".{adapter}." in f"{name}."]

    def _pairs(self) -> list[tuple[str, Tensor, Tensor]]:
        parameters = dict(self.policy.named_parameters())
        policy = self.policy.policy_parameters()
        return [(name, parameters[name.replace(f".{POLICY}", f".{REFERENCE}")], own) for name, own in policy]

    def _master(self, name: str, reference: Tensor) -> Tensor:
        """The fp32 values of a reference tensor: its own, unless an engine has cast it."""
        if reference.dtype == torch.float32:
            return reference.data
        self._masters[name] = self._masters[name].to(reference.device)
        return self._masters[name]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the reference towards the policy every ``ema_steps`` steps, in fp32; all ranks must call."""
        if step % self.options.ema_steps:
            return
        values = self.policy_values()
        for name, reference, _ in self._pairs():
            master = self._master(name, reference)
            reference.copy_(master.lerp_(values[name].to(master), self.options.ema_alpha))

    def state(self) -> dict[str, Tensor]:
        """The reference as it stands, fp32."""
        return {name: self._master(name, reference).detach().cpu().contiguous() for name, reference, _ in self._pairs()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put the reference back where the checkpoint left it.

        Raises:
            CheckpointError: If it is that of another adapter.
        """
        pairs = self._pairs()
        if {name: value.shape for name, value in state.items()} != {name: own.shape for name, own, _ in pairs}:
            raise CheckpointError(
                "the reference kept in the checkpoint has other tensors than this run's. "
                "Write: resume_from_checkpoint: <a checkpoint of this run>"
            )
        for name, reference, _ in pairs:
            reference.copy_(self._master(name, reference).copy_(state[name]))


_CANNOT_MIX = (
    "`dpo_plugin.reference.strategy: ema` mixes the policy's weights into the reference's, which must have the same "
    "shape: {}. Write: {}"
)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
