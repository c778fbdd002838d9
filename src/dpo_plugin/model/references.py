"""Reference strategies: where log π_ref comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dpo_plugin.errors import ConfigError
from dpo_plugin.model.adapters import POLICY, REFERENCE, PolicyReferenceModel
from dpo_plugin.types import CompletionLogps, PairBatch

Forward = Callable[[Any, PairBatch], CompletionLogps]
"""Runs a model on a batch; given to strategies so that policy and reference take the same numeric path."""


class ReferenceStrategy(ABC):
    """Gives the reference's log-probs."""

    def __init__(self, policy: Any, ref_model: Any | None = None):
        """Args: the unwrapped policy, and a second model where the host loaded one."""
        self.policy = policy
        self.ref_model = ref_model

    @abstractmethod
    def run(self, model: Any, batch: PairBatch, forward: Forward) -> CompletionLogps:
        """Run the reference.

        Args:
            model: The policy as the engine wrapped it (DDP, DeepSpeed, FSDP); always call this root.
            batch: The pairs.
            forward: ``forward(model, batch)`` runs a model.
        """

    def equals_policy_at_start(self) -> bool:
        """Whether the policy is this reference before the first step, so that step 0 can be checked."""
        return False

    @torch.no_grad()
    def logps(self, model: Any, batch: PairBatch, forward: Forward) -> Tensor:
        """(pairs, 2) fp32 nats summed over completion tokens: chosen, rejected; no gradient."""
        return torch.stack(self.run(model, batch, forward).sums.chunk(2), dim=1)


class AdapterReference(ReferenceStrategy):
    """The frozen reference adapter on the policy's own base model."""

    def __init__(self, policy: Any, ref_model: Any | None = None):
        super().__init__(policy, ref_model)
        if not isinstance(policy, PolicyReferenceModel) or not policy.has_reference:
            raise ConfigError(
                "reference strategy 'adapter' needs a reference adapter. Write: lora_model_dir: <SFT adapter folder>"
            )

    def equals_policy_at_start(self) -> bool:
        """Whether both adapters were attached with the same tensors."""
        return bool(self.policy.digests[POLICY] == self.policy.digests[REFERENCE])

    def run(self, model: Any, batch: PairBatch, forward: Forward) -> CompletionLogps:
        """Run with the reference adapter in the policy's place."""
        with self.policy.reference_active():
            return forward(model, batch)


class BaseReference(ReferenceStrategy):
    """The base model with its adapters off."""

    def __init__(self, policy: Any, ref_model: Any | None = None):
        super().__init__(policy, ref_model)
        if not isinstance(policy, PolicyReferenceModel):
            raise ConfigError("reference strategy 'base' needs an adapter to switch off. Write: adapter: lora")

    def equals_policy_at_start(self) -> bool:
        """Whether the policy is a fresh LoRA, which adds nothing yet."""
        return bool(self.policy.starts_as_base)

    def run(self, model: Any, batch: PairBatch, forward: Forward) -> CompletionLogps:
        """Run without any adapter."""
        with self.policy.adapters_off():
            return forward(model, batch)


class ModelReference(ReferenceStrategy):
    """A second, frozen model, for full fine-tuning."""

    def __init__(self, policy: Any, ref_model: Any | None = None):
        super().__init__(policy, ref_model)
        if ref_model is None:
            raise ConfigError(
                "reference strategy 'model' needs full fine-tuning, where the host loads a second model. "
                "Write: dpo_plugin: {reference: {strategy: adapter}}"
            )

    def run(self, model: Any, batch: PairBatch, forward: Forward) -> CompletionLogps:
        """Run the second model."""
        return forward(self.ref_model, batch)


STRATEGIES: Mapping[str, type[ReferenceStrategy]] = {
    "adapter": AdapterReference,
    "base": BaseReference,
    "model": ModelReference,
}
