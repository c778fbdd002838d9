"""Completion log-probabilities in fp32, whatever the model's dtype, without the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpo_plugin.compute.attention import EAGER, NAME, PairSegments, recorded_calls, without_masks
from dpo_plugin.compute.lm_head import (
    ENTROPY,
    LOG_COLLISION,
    LOGP,
    MEAN_LOGIT,
    ForwardOptions,
    LogitsFrom,
    logits_from,
    scoring_head,
    token_scores,
)
from dpo_plugin.compute.losses import LossOptions, PreferenceLoss
from dpo_plugin.errors import RegistrationError
from dpo_plugin.types import CompletionLogps, PairBatch, PairLogps


def run_model(model: Callable[..., Any], batch: PairBatch, options: ForwardOptions | None = None) -> CompletionLogps:
    """Forward a batch through the root module and take the completions' log-probs.

    The head's own forward is what is called, inside the root's, so that ZeRO-3 and FSDP2 gather its weight. Where
    nothing of what `logits_from` tries gives the model's logits, those of completion tokens are computed whole.

    Raises:
        ValueError: For a flat batch on a model that `attend_to_pairs` has not seen, which would hide the prompt
            from rejected; or if the engine rounds what the root returns, as FSDP2 does with a low ``output_dtype``.
    """
    options = options or ForwardOptions()
    inner = unwrapped(model)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if batch.segments:
        if inner.config._attn_implementation not in (NAME, EAGER):
            raise ValueError("a flat batch needs a model that attend_to_pairs has seen")
        device = batch.input_ids.device
        inputs["position_ids"] = batch.position_ids
        inputs["pair_segments"] = PairSegments(batch.segments, batch.input_ids.shape[1], device)
        inputs["attention_mask"] = _times_read(batch) if options.router_aux else torch.ones_like(batch.input_ids)
    if options.router_aux:
        inputs["output_router_logits"] = True
    with without_masks() if batch.segments else nullcontext():
        return _scored(model, inner, inputs, batch, options)


def _scored(
    model: Callable[..., Any], inner: Any, inputs: Mapping[str, Any], batch: PairBatch, options: ForwardOptions
) -> CompletionLogps:
    root = inner.get_base_model() if hasattr(inner, "get_base_model") else getattr(inner, "_orig_mod", inner)
    with recorded_calls():  # not of the forward that somebody may be recording
        way = logits_from(root, lambda: model(**inputs).logits, batch)
    if way is not LogitsFrom.UNKNOWN:
        with scoring_head(root, batch, options, way):
            output = model(**inputs)
        scores = output.logits[0]
        if scores.dtype.itemsize < 4:
            raise ValueError(
                f"the engine casts log-probs to {scores.dtype}. Write: MixedPrecisionPolicy(output_dtype=None)"
            )
    else:
        keep, rows = _rows_to_keep(batch)
        output = model(**inputs, logits_to_keep=keep)
        if output.logits.shape[1] != len(keep):  # a model that knows no logits_to_keep
            rows = batch.logit_positions
        scores = token_scores(output.logits.flatten(0, 1)[rows], batch.labels, options)
    logps = sum_completions(scores, batch, options)
    return replace(logps, router_aux=output.aux_loss) if options.router_aux else logps


def _times_read(batch: PairBatch) -> Tensor:
    """Count in how many of two rows per pair each token of a flat row would stand, (1, length); the mask of routers."""
    times = [n for prefix, chosen, rejected in batch.segments for n in [2] * prefix + [1] * (chosen + rejected)]
    padding = [0] * (batch.input_ids.shape[1] - len(times))
    return torch.tensor([times + padding], device=batch.input_ids.device)


def unwrapped(model: Any) -> Any:
    """Get the model inside DDP's or DeepSpeed's wrapper."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def _rows_to_keep(batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Find positions that predict a completion token in any row, and ``batch.logit_positions`` among them."""
    length = batch.input_ids.shape[1]
    keep, place = torch.unique(batch.logit_positions % length, return_inverse=True)
    return keep, batch.logit_positions // length * len(keep) + place


# ── from tokens to completions and pairs ──


def sum_completions(scores: Tensor, batch: PairBatch, options: ForwardOptions) -> CompletionLogps:
    """Sum and average the scores of `token_scores`, (tokens, columns), over each side's tokens."""

    def per_side(values: Tensor) -> Tensor:
        return sum_per_side(values, batch).to(values.dtype)

    logps = scores[:, LOGP]
    tokens = per_side(torch.ones_like(logps))
    at_least_one = tokens.clamp(min=1)
    weights = None
    if options.wpo:
        aligned = (logps - scores[:, LOG_COLLISION]).detach()
        weights = (per_side(aligned) / at_least_one).exp()
    unweighted = None
    if options.ld_alpha is not None:
        unweighted = per_side(logps)
        logps = torch.where(batch.beyond_shorter, options.ld_alpha * logps, logps)
    means = per_side(scores.detach()) / at_least_one[:, None]
    entropy = means[:, ENTROPY] if options.entropy else None
    return CompletionLogps(per_side(logps), tokens, means[:, MEAN_LOGIT], weights, entropy, unweighted)


def sum_per_side(values: Tensor, batch: PairBatch) -> Tensor:
    """Sum (tokens, ...) over each side's tokens, (2 * pairs, ...), in the same order each time, gradients included.

    ``index_add``, ``scatter_add`` and ``cumsum`` add in any order on CUDA (torch.use_deterministic_algorithms), which
    in fp32 moved the reward of an answer of 4,096 tokens by up to 2.7e-3 at β = 0.1 while policy and reference were
    equal. Here each side is a row of its own, and rows are summed; nothing is written twice, so backward only copies.
    Long sums keep their digits in fp64, which Apple's GPUs have not.
    """
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    rows = list(torch.split(values.to(dtype), list(batch.lengths)))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).sum(dim=1)


def completion_logps(logits: Tensor, batch: PairBatch, options: ForwardOptions | None = None) -> CompletionLogps:
    """Score completions from the logits of all positions, (rows, length, vocabulary): the plain path."""
    options = options or ForwardOptions()
    rows = logits.flatten(0, 1)[batch.logit_positions]
    return sum_completions(token_scores(rows, batch.labels, options), batch, options)


def pair_logps(policy: CompletionLogps, ref_logps: Tensor, beta: float, sources: Sequence[str] = ()) -> PairLogps:
    """Put the policy's log-probs, (2 * pairs,), and the reference's, (pairs, 2) fp32 nats, side by side."""
    chosen, rejected = policy.sums.chunk(2)
    chosen_tokens, rejected_tokens = policy.tokens.chunk(2)
    chosen_logits, rejected_logits = policy.mean_logits.chunk(2)
    chosen_entropy, rejected_entropy = (None, None) if policy.entropy is None else policy.entropy.chunk(2)
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
        chosen_entropy=chosen_entropy,
        rejected_entropy=rejected_entropy,
        unweighted=None if policy.unweighted is None else policy.unweighted.chunk(2)[0],
    )


@dataclass(frozen=True)
class Registered:
    """A loss or metric that somebody registered, whose faults become errors that name it and its owner.

    Attributes:
        kind: ``loss`` or ``metric``.
        name: As in the YAML.
        owner: Gives the owner's name, for errors.
        line: The line to write in order to do without, for errors.
    """

    kind: str
    name: str
    owner: Callable[[str], str]
    line: str

    def call(self, function: Callable[[], Any]) -> Any:
        """Call it.

        Raises:
            RegistrationError: If it raises.
        """
        try:
            return function()
        except Exception as error:
            raise self._error(f"raised {type(error).__name__}: {error}") from error

    def one_per_pair(self, value: Any, logps: PairLogps) -> Tensor:
        """Check that it gave one value per pair, (pairs,).

        Raises:
            RegistrationError: If it gave anything else.
        """
        shape = logps.policy_chosen_logps.shape
        if isinstance(value, Tensor) and value.shape == shape:
            return value
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise self._error(f"returned {found} for {shape[0]} pairs, not a Tensor of shape ({shape[0]},)")

    def _error(self, what: str) -> RegistrationError:
        return RegistrationError(
            f"{self.kind} {self.name!r} of {self.owner(self.name)} {what}. "
            f"Update or uninstall its package, or leave it out. Write: {self.line}"
        )


def single_losses(
    logps: PairLogps,
    losses: Mapping[str, PreferenceLoss],
    options: LossOptions,
    owner: Callable[[str], str] = lambda _: "dpo_plugin",
) -> dict[str, Tensor]:
    """Compute each loss by itself, before its weight, (pairs,).

    Raises:
        RegistrationError: If a loss raises, or gives something else than one value per pair; names its ``owner``.
    """
    values = {}
    for name, loss in losses.items():
        registered = Registered("loss", name, owner, "dpo_loss_type: [sigmoid]")
        values[name] = registered.one_per_pair(registered.call(partial(loss, logps, options)), logps)
    return values


def total_loss(values: Mapping[str, Tensor], weights: Mapping[str, float], wpo_weights: Tensor | None = None) -> Tensor:
    """Add up losses, (pairs,), times their weights, each scaled by the product of its pair's two ``wpo_weights``."""
    total = torch.stack([weights[name] * value for name, value in values.items()]).sum(dim=0)
    if wpo_weights is not None:
        chosen, rejected = wpo_weights.chunk(2)
        total = total * chosen * rejected
    return total
