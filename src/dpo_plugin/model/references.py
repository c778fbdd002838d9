"""Reference strategies: where log π_ref comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dpo_plugin.config import ReferenceConfig
from dpo_plugin.errors import ConfigError
from dpo_plugin.model.adapter_config import AdapterFolder
from dpo_plugin.model.adapters import POLICY, REFERENCE, PolicyReferenceModel
from dpo_plugin.types import CompletionLogps, PairBatch

Forward = Callable[[Any, PairBatch], CompletionLogps]
"""Runs a model on a batch; given to strategies so that policy and reference take the same numeric path."""


class ReferenceStrategy:
    """Gives the reference's log-probs; a subclass defines `active`, or `run`.

    Args:
        policy: The unwrapped policy.
        ref_model: The second model, where the host loaded one.
        options: The ``dpo_plugin.reference`` section.

    Attributes:
        moves: Whether its tensors change during training: it is not cached, not sharded over ranks, and its `state` is
            in checkpoints.
        runs_model: Whether it runs a model at all, so that its log-probs are worth caching.
        needs_lora: Whether the policy must be a LoRA, which can be switched off.
        needs_adapter: Whether it is a LoRA of its own, that of ``adapter_dir`` or ``lora_model_dir``.
        needs_second_model: Whether it is the second model that the host loads for full fine-tuning.
        policy_values: Gives the policy adapter by parameter name as the optimizer holds it, fp32; all ranks must call.

    Raises:
        ConfigError: If it needs what is not there.
    """

    moves: ClassVar[bool] = False
    runs_model: ClassVar[bool] = True
    needs_lora: ClassVar[bool] = False
    needs_adapter: ClassVar[bool] = False
    needs_second_model: ClassVar[bool] = False

    def __init__(self, policy: Any, ref_model: Any | None = None, options: ReferenceConfig | None = None):
        self.policy = policy
        self.ref_model = ref_model
        self.options = options or ReferenceConfig()
        self.policy_values: Callable[[], Mapping[str, Tensor]] = self._parameters
        named = f"the reference strategy {type(self).__name__} needs"
        if self.needs_second_model and ref_model is None:
            raise ConfigError(
                f"{named} full fine-tuning, where the host loads a second model. "
                "Write: dpo_plugin: {reference: {strategy: adapter}}"
            )
        if (self.needs_lora or self.needs_adapter) and not isinstance(policy, PolicyReferenceModel):
            raise ConfigError(f"{named} an adapter to switch off. Write: adapter: lora")
        if self.needs_adapter and not policy.has_reference:
            raise ConfigError(f"{named} a reference adapter. Write: lora_model_dir: <SFT adapter folder>")

    def _parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.policy.policy_parameters()}

    def run(self, model: Any, batch: PairBatch, forward: Forward) -> CompletionLogps:
        """Run the reference: unless a strategy says otherwise, the model that `active` gives.

        Args:
            model: The policy as the engine wrapped it (DDP, DeepSpeed, FSDP); always call this root.
            batch: The pairs.
            forward: ``forward(model, batch)`` runs a model.
        """
        with self.active(model) as reference:
            assert reference is not None, f"{type(self).__name__} defines neither active nor run"
            return forward(reference, batch)

    @contextmanager
    def active(self, model: Any) -> Iterator[Any]:
        """Context that gives a model which is the reference, so that it can also answer; None where there is none."""
        yield None

    def equals_policy_at_start(self) -> bool:
        """Whether the policy is this reference before the first step, so that step 0 can be checked."""
        return False

    def identity(self) -> str:
        """What tells this reference from another: a digest of its weights, or a fixed word; kept in checkpoints."""
        return type(self).__name__

    @classmethod
    def cacheable(cls) -> bool:
        """Whether its log-probs can be cached."""
        return cls.runs_model and not cls.moves

    @classmethod
    def check_adapters(cls, policy: AdapterFolder | None, reference: AdapterFolder | None) -> None:
        """Called before any weights are read.

        Args:
            policy: The folder that the policy starts from, if any.
            reference: The folder of the reference adapter, if the strategy uses one.

        Raises:
            ConfigError: If the two do not suit the strategy.
        """

    def after_step(self, step: int) -> None:
        """Called after each optimizer step, with their number so far, for a reference that moves."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold because the reference cannot be rebuilt from its source."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""

    @torch.no_grad()
    def logps(self, model: Any, batch: PairBatch, forward: Forward) -> Tensor:
        """(pairs, 2) fp32 nats summed over completion tokens: chosen, rejected; no gradient."""
        return torch.stack(self.run(model, batch, forward).sums.chunk(2), dim=1)


@dataclass(frozen=True)
class ReferenceChoice:
    """The reference that a config asks for.

    Attributes:
        name: Name of the strategy.
        adapter: The adapter that is the reference, if the strategy uses one.
        cache_dir: Folder for the reference's log-probs, or None.
    """

    name: str
    strategy: type[ReferenceStrategy]
    adapter: AdapterFolder | None = None
    cache_dir: Path | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.adapter.path}" if self.adapter else self.name


def strategy_name(cfg: Mapping[str, Any], reference: ReferenceConfig) -> str:
    """Name of the strategy of a raw config: the one it names, or the default that docs/references.md gives.

    Raises:
        ConfigError: If the config trains an adapter other than LoRA.
    """
    adapter = cfg.get("adapter")
    if adapter not in (None, "lora", "qlora"):
        raise ConfigError(
            f"`adapter: {adapter}`: Only LoRA is supported: policy and reference share one base. Write: adapter: lora"
        )
    has_folder = cfg.get("lora_model_dir") or reference.adapter_dir
    return reference.strategy or ("model" if not adapter else "adapter" if has_folder else "base")


class AdapterReference(ReferenceStrategy):
    """The frozen reference adapter on the policy's own base model."""

    needs_lora = True
    needs_adapter = True

    def identity(self) -> str:
        """SHA-256 of the reference adapter as attached."""
        return f"sha256:{self.policy.digests[REFERENCE]}"

    def equals_policy_at_start(self) -> bool:
        """Whether both adapters were attached with the same tensors."""
        return bool(self.policy.digests[POLICY] == self.policy.digests[REFERENCE])

    @contextmanager
    def active(self, model: Any) -> Iterator[Any]:
        """The same model with the reference adapter in the policy's place."""
        with self.policy.reference_active():
            yield model


class BaseReference(ReferenceStrategy):
    """The base model with its adapters off."""

    needs_lora = True

    def equals_policy_at_start(self) -> bool:
        """Whether the policy is a fresh LoRA, which adds nothing yet."""
        return bool(self.policy.starts_as_base)

    @contextmanager
    def active(self, model: Any) -> Iterator[Any]:
        """The same model without any adapter."""
        with self.policy.adapters_off():
            yield model


class ModelReference(ReferenceStrategy):
    """A second, frozen model, for full fine-tuning."""

    needs_second_model = True

    def equals_policy_at_start(self) -> bool:
        """Both are loaded from the same files."""
        return True

    @contextmanager
    def active(self, model: Any) -> Iterator[Any]:
        """The second model."""
        yield self.ref_model


class NoReference(ReferenceStrategy):
    """Reference-free: log π_ref = 0, so rewards are β log π."""

    runs_model = False

    def run(self, model: Any, batch: PairBatch, forward: Forward) -> CompletionLogps:
        """Zeros; no forward."""
        zeros = torch.zeros(2 * batch.num_pairs, device=batch.input_ids.device)
        return CompletionLogps(zeros, zeros, zeros)
