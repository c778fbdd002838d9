"""One micro-batch: policy and reference forward, `PairLogps`, checks, loss, and what metrics are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpo_plugin.compute.gradient_checkpointing import without_checkpointing
from dpo_plugin.compute.lm_head import ForwardOptions
from dpo_plugin.compute.logps import pair_logps, run_model, single_losses, total_loss
from dpo_plugin.compute.losses import LossOptions, PreferenceLoss
from dpo_plugin.compute.step_zero import check_policy_is_reference
from dpo_plugin.errors import NotFiniteError
from dpo_plugin.model.cache import CachedReference
from dpo_plugin.model.references import Forward
from dpo_plugin.types import CompletionLogps, PairBatch, PairLogps

_SIDES = {
    "policy_chosen_logps": "policy's log-probability of chosen",
    "policy_rejected_logps": "policy's log-probability of rejected",
    "ref_chosen_logps": "reference's log-probability of chosen",
    "ref_rejected_logps": "reference's log-probability of rejected",
}


def score_pairs(
    model: Any, batch: PairBatch, forward: Forward, reference: Callable[[Any, PairBatch], Tensor], beta: float
) -> tuple[PairLogps, CompletionLogps]:
    """Run the policy, as the engine wrapped it, and then the reference, which gives (pairs, 2) fp32 nats.

    Returns:
        Both side by side, and what the policy's forward gave.
    """
    policy = forward(model, batch)
    return pair_logps(policy, reference(model, batch), beta, batch.sources), policy


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a micro-batch gives.

    Attributes:
        loss: Mean loss over the pairs that count, and the routers' where it is asked for, scalar, with gradient.
        logps: The pairs that count, for metrics; None if none do.
        losses: What `loss` is made of where it is not one loss alone: each by itself, before its weight and WPO's, of
            the pairs that count, (pairs,), without gradient; the routers' as ``router_aux``.
    """

    loss: Tensor
    logps: PairLogps | None
    losses: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class PreferenceStep:
    """Computes the loss of a micro-batch.

    Attributes:
        reference: The reference behind its cache.
        losses: Name → loss.
        weights: Name → the loss's weight.
        loss_options: Settings that losses share.
        forward_options: How the policy's completions are scored.
        layers: The model's `GradientCheckpointingLayer`s; a forward without gradients checkpoints none.
        locate: Takes a batch and the index of a pair; says where the pair comes from and what to write, for errors.
        owner: Name of a loss → who registered it, for errors.
        step_zero_dtype: The coarsest dtype that the run computes in, if policy and reference must be equal on the next
            training batch; None once that is checked, or if they start from different weights.
    """

    reference: CachedReference
    losses: Mapping[str, PreferenceLoss]
    weights: Mapping[str, float]
    loss_options: LossOptions
    forward_options: ForwardOptions
    layers: Sequence[nn.Module]
    locate: Callable[[PairBatch, int], str]
    owner: Callable[[str], str]
    step_zero_dtype: torch.dtype | None = None

    def __call__(self, model: Any, batch: PairBatch, counted: Sequence[int], training: bool) -> StepResult:
        """Compute loss and log-probs of a micro-batch; pairs not at an index in ``counted`` only keep ranks together.

        Raises:
            NotFiniteError: If a log-probability is NaN or infinite.
            ReferenceMismatchError: If policy and reference differ before the first step, though they must not.
        """
        dtype = self.step_zero_dtype if training else None
        reference = partial(self.reference_logps, anew=dtype is not None)
        logps, policy = score_pairs(model, batch, self._policy_forward, reference, self.loss_options.beta)
        self._check_finite(logps, batch)
        if dtype is not None:
            self.step_zero_dtype = None
            check_policy_is_reference(logps, dtype)
        values = single_losses(logps, self.losses, self.loss_options, self.owner)
        losses = total_loss(values, self.weights, policy.wpo_weights)
        loss = losses[counted].mean() if 0 < len(counted) < batch.num_pairs else losses.mean()
        if policy.router_aux is not None and (weight := self.loss_options.router_aux_loss_coef):
            loss = loss + weight * policy.router_aux
            values["router_aux"] = policy.router_aux.expand(batch.num_pairs)
        if not counted:
            return StepResult(loss, None)
        if len(values) == 1 and [*self.weights.values()] == [1.0] and policy.wpo_weights is None:
            values = {}
        return StepResult(loss, logps.only(counted), {name: value.detach()[counted] for name, value in values.items()})

    def reference_logps(self, model: Any, batch: PairBatch, anew: bool = False) -> Tensor:
        """Get the reference's log-probs, (pairs, 2) fp32 nats: chosen, rejected; from the cache if all are there.

        With ``anew``, equal on all ranks, the reference is run all the same: cached log-probs come from batches of
        another shape, which in bf16 moves them by more than the tolerance of step 0.
        """
        return self.reference.logps(model, batch, self.forward_without_gradients, anew)

    def _policy_forward(self, model: Any, batch: PairBatch) -> CompletionLogps:
        return run_model(model, batch, self.forward_options)

    @torch.no_grad()
    def forward_without_gradients(self, model: Any, batch: PairBatch) -> CompletionLogps:
        """Run a model without WPO weights, entropy and the routers' loss, which are the policy's alone."""
        with without_checkpointing(self.layers):
            return run_model(model, batch, replace(self.forward_options, wpo=False, entropy=False, router_aux=False))

    def _check_finite(self, logps: PairLogps, batch: PairBatch) -> None:
        values = torch.stack([getattr(logps, name) for name in _SIDES]).detach()
        finite = torch.isfinite(values)
        if finite.all():
            return
        side, pair = (~finite).nonzero()[0].tolist()
        name, value = [*_SIDES.values()][side], values[side, pair].item()
        raise NotFiniteError(f"the {name} is {value} {self.locate(batch, pair)}")
