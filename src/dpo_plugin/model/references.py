"""Reference strategies: where log π_ref comes from."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from dpo_plugin.config import ReferenceConfig
from dpo_plugin.errors import ConfigError
from dpo_plugin.model.adapters import POLICY, REFERENCE, PolicyReferenceModel
from dpo_plugin.model.cache import ReferenceLogpStore, deviation
from dpo_plugin.types import CompletionLogps, PairBatch

Forward = Callable[[Any, PairBatch], CompletionLogps]
"""Runs a model on a batch; given to strategies so that policy and reference take the same numeric path."""


class ReferenceStrategy(ABC):
    """Gives the reference's log-probs.

    Args:
        policy: The unwrapped policy.
        ref_model: The second model, where the host loaded one.
        options: The ``dpo_plugin.reference`` section.

    Attributes:
        uses_reference_adapter: Whether the adapter of ``adapter_dir`` (or ``lora_model_dir``) is to be attached.
        fixed: Whether the reference stays as it is, so that its log-probs can be kept.
    """

    uses_reference_adapter: ClassVar[bool] = False
    fixed: ClassVar[bool] = True

    def __init__(self, policy: Any, ref_model: Any | None = None, options: ReferenceConfig | None = None):
        self.policy = policy
        self.ref_model = ref_model
        self.options = options or ReferenceConfig()

    @abstractmethod
    def run(self, model: Any, batch: PairBatch, forward: Forward) -> CompletionLogps:
        """Run the reference.

        Args:
            model: The policy as the engine wrapped it (DDP, DeepSpeed, FSDP); always call this root.
            batch: The pairs.
            forward: ``forward(model, batch)`` runs a model.
        """

    @contextmanager
    def active(self, model: Any) -> Iterator[Any]:
        """Context that gives a model which is the reference, so that it can answer; None where there is none.

        Args:
            model: The policy.
        """
        yield None

    def equals_policy_at_start(self) -> bool:
        """Whether the policy is this reference before the first step, so that step 0 can be checked."""
        return False

    def identity(self) -> str:
        """What tells this reference from another: a digest of its weights, or a fixed word; kept in checkpoints."""
        return type(self).__name__

    def after_step(self, step: int) -> None:  # noqa: B027
        """Called after each optimizer step, for a reference that moves.

        Args:
            step: Optimizer steps done.
        """

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold because the reference cannot be rebuilt from its source."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take back what `state` gave."""

    @torch.no_grad()
    def logps(self, model: Any, batch: PairBatch, forward: Forward) -> Tensor:
        """(pairs, 2) fp32 nats summed over completion tokens: chosen, rejected; no gradient."""
        return torch.stack(self.run(model, batch, forward).sums.chunk(2), dim=1)


class AdapterReference(ReferenceStrategy):
    """The frozen reference adapter on the policy's own base model."""

    uses_reference_adapter = True

    def __init__(self, policy: Any, ref_model: Any | None = None, options: ReferenceConfig | None = None):
        super().__init__(policy, ref_model, options)
        if not isinstance(policy, PolicyReferenceModel) or not policy.has_reference:
            raise ConfigError(
                "reference strategy 'adapter' needs a reference adapter. Write: lora_model_dir: <SFT adapter folder>"
            )

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

    def run(self, model: Any, batch: PairBatch, forward: Forward) -> CompletionLogps:
        """Run with the reference adapter in the policy's place."""
        with self.active(model) as reference:
            return forward(reference, batch)


class BaseReference(ReferenceStrategy):
    """The base model with its adapters off."""

    def __init__(self, policy: Any, ref_model: Any | None = None, options: ReferenceConfig | None = None):
        super().__init__(policy, ref_model, options)
        if not isinstance(policy, PolicyReferenceModel):
            raise ConfigError("reference strategy 'base' needs an adapter to switch off. Write: adapter: lora")

    def equals_policy_at_start(self) -> bool:
        """Whether the policy is a fresh LoRA, which adds nothing yet."""
        return bool(self.policy.starts_as_base)

    @contextmanager
    def active(self, model: Any) -> Iterator[Any]:
        """The same model without any adapter."""
        with self.policy.adapters_off():
            yield model

    def run(self, model: Any, batch: PairBatch, forward: Forward) -> CompletionLogps:
        """Run without any adapter."""
        with self.active(model) as reference:
            return forward(reference, batch)


class ModelReference(ReferenceStrategy):
    """A second, frozen model, for full fine-tuning."""

    def __init__(self, policy: Any, ref_model: Any | None = None, options: ReferenceConfig | None = None):
        super().__init__(policy, ref_model, options)
        if ref_model is None:
            raise ConfigError(
                "reference strategy 'model' needs full fine-tuning, where the host loads a second model. "
                "Write: dpo_plugin: {reference: {strategy: adapter}}"
            )

    def equals_policy_at_start(self) -> bool:
        """Both are loaded from the same files."""
        return True

    @contextmanager
    def active(self, model: Any) -> Iterator[Any]:
        """The second model."""
        yield self.ref_model

    def run(self, model: Any, batch: PairBatch, forward: Forward) -> CompletionLogps:
        """Run the second model."""
        with self.active(model) as reference:
            return forward(reference, batch)


class EmaReference(AdapterReference):
    """TR-DPO's soft update (Gorbatovski et al. 2024, arXiv 2404.09656): reference ← α·policy + (1−α)·reference."""

    fixed = False

    def _pairs(self) -> list[tuple[str, Tensor, Tensor]]:
        parameters = dict(self.policy.named_parameters())
        policy = self.policy.policy_parameters()
        return [(name, parameters[name.replace(f".{POLICY}", f".{REFERENCE}")], own) for name, own in policy]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the reference towards the policy every ``ema_steps`` steps."""
        if step % self.options.ema_steps == 0:
            for _, reference, policy in self._pairs():
                reference.lerp_(policy.to(reference.dtype), self.options.ema_alpha)

    def state(self) -> dict[str, Tensor]:
        """The reference as it stands."""
        return {name: reference.detach().cpu().contiguous() for name, reference, _ in self._pairs()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put the reference back where the checkpoint left it."""
        for name, reference, _ in self._pairs():
            reference.copy_(state[name])


class NoReference(ReferenceStrategy):
    """Reference-free: log π_ref = 0, so rewards are β log π."""

    fixed = False  # there is nothing to keep

    def run(self, model: Any, batch: PairBatch, forward: Forward) -> CompletionLogps:
        """Zeros; no forward."""
        zeros = torch.zeros(2 * batch.pairs, device=batch.input_ids.device)
        return CompletionLogps(zeros, zeros, zeros)


CHECKED = 4
"""Batches at the start of a run whose kept log-probs are compared with a forward's."""


class KeptReference:
    """A reference strategy behind a store: runs the reference only for rows that nobody has computed yet.

    The first batches with rows from disk are run all the same: where the kept log-probs are not those of this
    reference, although their key is, all of them are dropped and computed again.

    Args:
        strategy: The strategy.
        store: Where log-probs are kept, or None.
        on_any_rank: Tells whether a condition holds on any rank, since ranks must forward together.
        tolerance: Most that kept log-probs may be off, as `deviation` measures it.
        warn: Says something to the user.

    Attributes:
        forwards: Batches for which the reference was run because log-probs were missing.
        fresh: Whether the reference was run for the last batch.
    """

    def __init__(
        self,
        strategy: ReferenceStrategy,
        store: ReferenceLogpStore | None,
        on_any_rank: Callable[[bool], bool],
        tolerance: float = 1e-3,
        warn: Callable[[str], None] = warnings.warn,
    ):
        self.strategy = strategy
        self.store = store
        self.on_any_rank = on_any_rank
        self.tolerance = tolerance
        self.warn = warn
        self.forwards = 0
        self.fresh = True
        self._unchecked = CHECKED

    def logps(self, model: Any, batch: PairBatch, forward: Forward, anew: bool = False) -> Tensor:
        """(pairs, 2) fp32 nats; from the store if every rank has all of its rows there.

        Args:
            model: As in `ReferenceStrategy.run`.
            batch: The pairs.
            forward: As in `ReferenceStrategy.run`.
            anew: Run the reference even so; equal on all ranks.
        """
        if self.store is None:
            self.forwards += 1
            return self.strategy.logps(model, batch, forward)
        kept = self.store.get(batch.keys, batch.input_ids.device)
        missing = self.on_any_rank(kept is None)
        read = self.store.read(batch.keys)
        check = anew or (self._unchecked > 0 and self.on_any_rank(not read.isnan().all()))
        self.fresh = missing or check
        if kept is not None and not self.fresh:
            return kept
        self.forwards += missing
        logps = self.strategy.logps(model, batch, forward)
        if check:
            self._unchecked -= 1
            self._compare(self.store, read, logps, batch)
        self.store.put(batch.keys, logps)
        return logps

    def _compare(self, store: ReferenceLogpStore, read: Tensor, logps: Tensor, batch: PairBatch) -> None:
        tokens = torch.tensor(batch.lengths).reshape(2, -1).T
        if not self.on_any_rank(deviation(read, logps.cpu(), tokens) > self.tolerance):
            return
        store.forget()
        self.warn(
            f"dpo_plugin: the reference log-probs kept in {store.folder} are not those of this reference: they are off "
            f"by more than rounding explains ({self.tolerance} nats per square root of a token). The base model's "
            "weights have changed, or a package computes it differently. They are dropped and computed again"
        )


STRATEGIES: Mapping[str, type[ReferenceStrategy]] = {
    "adapter": AdapterReference,
    "base": BaseReference,
    "model": ModelReference,
    "ema": EmaReference,
    "none": NoReference,
}
