"""Completion log-probabilities in fp32, whatever the model's dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_plugin.compute.losses import LossOptions, PreferenceLoss
from dpo_plugin.types import CompletionLogps, PairBatch, PairLogps


def completion_logps(logits: Tensor, batch: PairBatch, wpo: bool = False) -> CompletionLogps:
    """Sum the log-probabilities of the completion tokens.

    Only the rows that predict a completion token are taken to fp32. TRL 1.9 takes the log-softmax and its sum in
    the model's dtype, which in bf16 moves rewards in steps of 0.05 (trl/trainer/dpo_trainer.py:1347).

    Args:
        logits: (rows, length, vocabulary), any float dtype.
        batch: The batch that was run.
        wpo: Also compute WPO weights (Zhou et al. 2024, arXiv 2406.11827, eq. 2).
    """
    predicts = batch.completion_mask[:, 1:].bool()
    row = predicts.nonzero()[:, 0]
    labels = batch.input_ids[:, 1:][predicts]
    scores = logits[:, :-1][predicts].float()
    normaliser = scores.logsumexp(dim=-1)
    token_logps = scores.gather(1, labels[:, None])[:, 0] - normaliser
    rows = logits.shape[0]
    tokens = predicts.sum(dim=1).float()
    at_least_one = tokens.clamp(min=1)

    def per_row(values: Tensor) -> Tensor:
        return torch.zeros(rows, device=values.device, dtype=values.dtype).index_add(0, row, values)

    weights = None
    with torch.no_grad():
        mean_logits = per_row(scores.mean(dim=-1)) / at_least_one
        if wpo:
            log_collision = (2 * scores).logsumexp(dim=-1) - 2 * normaliser
            weights = (per_row(token_logps - log_collision) / at_least_one).exp()
    return CompletionLogps(per_row(token_logps), tokens, mean_logits, weights)


def run_model(model: Callable[..., Any], batch: PairBatch, wpo: bool = False) -> CompletionLogps:
    """Forward a batch through the root module and take the completions' log-probs."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return completion_logps(output.logits, batch, wpo)


def pair_logps(policy: CompletionLogps, ref_logps: Tensor, beta: float, sources: Sequence[str] = ()) -> PairLogps:
    """Put policy and reference side by side.

    Args:
        policy: The policy's log-probs, (2 * pairs,).
        ref_logps: (pairs, 2) fp32 nats: chosen, rejected.
        beta: β.
        sources: One per pair.
    """
    chosen, rejected = policy.sums.chunk(2)
    chosen_tokens, rejected_tokens = policy.tokens.chunk(2)
    chosen_logits, rejected_logits = policy.mean_logits.chunk(2)
    return PairLogps(
        policy_chosen_logps=chosen,
        policy_rejected_logps=rejected,
        ref_chosen_logps=ref_logps[:, 0],
        ref_rejected_logps=ref_logps[:, 1],
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        chosen_logits=chosen_logits,
        rejected_logits=rejected_logits,
        beta=beta,
        sources=sources,
    )


def total_loss(
    logps: PairLogps,
    losses: Mapping[str, tuple[PreferenceLoss, float]],
    options: LossOptions,
    wpo_weights: Tensor | None = None,
) -> Tensor:
    """Weighted sum of losses, (pairs,).

    Args:
        logps: Policy and reference.
        losses: Name → loss and its weight.
        options: Settings that losses share.
        wpo_weights: (2 * pairs,) weights that scale each pair's loss by the product of its two.
    """
    total = torch.zeros_like(logps.policy_chosen_logps)
    for loss, weight in losses.values():
        total = total + weight * loss(logps, options)
    if wpo_weights is not None:
        chosen, rejected = wpo_weights.chunk(2)
        total = total * chosen * rejected
    return total
