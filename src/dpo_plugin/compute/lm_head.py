"""A language model's head as a scorer of tokens: fp32, some rows at a time, with exact gradients and no logits kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dpo_plugin.types import PairBatch

CHUNK_BYTES = 64 * 2**20
"""fp32 logits that are held at a time unless the config says how many rows."""

LOGP, MEAN_LOGIT, LOG_COLLISION, ENTROPY = range(4)
"""Columns of what a head says of a token: log π(token), mean logit, log Σ_v π(v)² for WPO, and entropy in nats."""


@dataclass(frozen=True, slots=True)
class ForwardOptions:
    """How completions are scored.

    Attributes:
        wpo: Also compute WPO weights (Zhou et al. 2024, arXiv 2406.11827, eq. 2).
        ld_alpha: Weight of the tokens beyond the length of the pair's shorter completion: LD-DPO (Liu et al. 2024,
            arXiv 2409.06411); None or 1 leaves them as they are.
        entropy: Also compute the entropy of each token's distribution.
        chunk: Completion tokens whose logits are held at a time; None for `CHUNK_BYTES` of them.
        router_aux: Also take the load-balancing loss of a mixture of experts' routers from the model.
    """

    wpo: bool = False
    ld_alpha: float | None = None
    entropy: bool = False
    chunk: int | None = None
    router_aux: bool = False


# ── where a model's logits come from ──


class LogitsFrom(Enum):
    """What makes a model's logits of the hidden rows that its head is given."""

    HEAD = "the head alone"
    ROOT = "the head, and what the root's forward does behind it"
    UNKNOWN = "neither"


_known: WeakKeyDictionary[nn.Module, LogitsFrom] = WeakKeyDictionary()


def logits_from(root: Any, forward: Callable[[], Tensor], batch: PairBatch) -> LogitsFrom:
    """Find out where a model's logits come from, once, from the logits of one row of this batch.

    A soft-cap (Gemma 2), a scale (Granite, Cohere) or whatever stands behind the head is the model's own code, which
    is run on hidden rows alone in `_behind_head`; whether that gives the model's logits is compared, not listed.

    Args:
        root: The causal language model, without adapters' and engines' wrappers.
        forward: Runs it, through the wrappers, and returns its logits.
        batch: What ``forward`` runs it on.
    """
    if root not in _known:
        head = root.get_output_embeddings()
        seen: dict[LogitsFrom, Tensor] = {}
        logits_of = head.forward

        def first_row(hidden: Tensor) -> Tensor:
            row = hidden.flatten(0, -2)[batch.logit_positions[:1]]
            seen[LogitsFrom.HEAD] = logits_of(row)
            with suppress(Exception):  # a root that cannot run on hidden rows alone
                seen[LogitsFrom.ROOT] = _behind_head(root, head, logits_of, row)
            return seen[LogitsFrom.HEAD].clone()[None]

        with torch.no_grad(), _forward_of(head, first_row), torch.compiler.set_stance("force_eager"):
            logits = forward()[0]
        equal = (way for way, found in seen.items() if torch.equal(found.to(logits.dtype), logits))
        _known[root] = next(equal, LogitsFrom.UNKNOWN)
    return _known[root]


def assume_logits_from_head(root: nn.Module) -> None:
    """Leave out the comparison of `logits_from`, for tensors that have no values."""
    _known[root] = LogitsFrom.HEAD


class _Hidden:
    """What a model without its head returns, as far as logits are made of it."""

    def __init__(self, rows: Tensor):
        self.last_hidden_state = rows

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _behind_head(root: Any, head: Any, logits_of: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Run the forward of a model's class on (tokens, hidden) that its layers have computed."""
    stubs = {head: nn.Module(), root.base_model: nn.Module()}  # hooks gather and release weights, and must not run
    stubs[head].forward, stubs[root.base_model].forward = logits_of, lambda *_, **__: _Hidden(rows[None])
    before = dict(root._modules)
    root._modules.update({name: stubs[module] for name, module in before.items() if module in stubs})
    try:
        ids = torch.zeros(1, len(rows), dtype=torch.long, device=rows.device)
        logits: Tensor = type(root).forward(root, input_ids=ids, use_cache=False).logits[0]
    finally:
        root._modules.update(before)
    return logits


@contextmanager
def _forward_of(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Context in which a module, within its hooks, runs another forward."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def scoring_head(root: Any, batch: PairBatch, options: ForwardOptions, way: LogitsFrom) -> Iterator[None]:
    """Context in which a model returns scores of completion tokens, (1, tokens, columns), as its logits."""
    head = root.get_output_embeddings()
    head_forward, root_forward = head.forward, root.forward
    own = way is LogitsFrom.ROOT
    logits_of: Callable[[Tensor], Tensor] = head_forward
    if own:
        logits_of = torch.compiler.disable(partial(_behind_head, root, head, head_forward))  # type: ignore[no-untyped-call]
    found: list[Tensor] = []

    def score(hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, -2)[batch.logit_positions]
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters())
        vocabulary = int(getattr(head, "out_features", None) or head.weight.shape[0])
        product = not own and _is_product(head)
        scores = chunked_scores(logits_of, rows, batch.labels, options, trains, vocabulary, product)
        found.append(scores[None])
        return scores[None]

    def return_scores(*args: Any, **kwargs: Any) -> Any:
        output = root_forward(*args, **kwargs)
        output.logits = found.pop()  # not what has been done to them behind the head
        return output

    with _forward_of(head, score), _forward_of(root, return_scores) if own else nullcontext():
        yield


def _is_product(head: Any) -> bool:
    """Whether the head's logits are W h and nothing else."""
    return (
        isinstance(head, nn.Linear)
        and getattr(head, "bias", None) is None
        and head.weight.dtype in (torch.float32, torch.float64)
    )


def chunked_scores(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    options: ForwardOptions,
    head_trains: bool,
    vocabulary: int,
    product: bool = False,
) -> Tensor:
    """Score tokens with the logits of one chunk at a time; gradients are exact.

    A frozen head's log π(y|h) depends on its row h alone, so ∂ log π/∂h = ∂logits/∂h · (onehot(y) − π) is kept from the
    forward, (tokens, hidden), and backward is one product per row; no logits are computed twice and none are kept. A
    head that trains needs the gradient of the loss first, so its chunks are computed again in backward.

    If logits are W h, the kept gradient g = Wᵀ(onehot(y) − π) gives the entropy for one product of a row: it is
    log Z − Σ π(v) logit(v), and h · g = logit(y) − Σ π(v) logit(v), so it is h · g − log π(y).

    Args:
        logits_of: The head: (n, hidden) → (n, vocabulary).
        hidden: (tokens, hidden).
        labels: (tokens,).
        options: How completions are scored.
        head_trains: Whether the head has parameters that train.
        vocabulary: Its size, for the default chunk.
        product: Whether the head's logits are W h, in fp32 at least.

    Returns:
        (tokens, columns), fp32 or fp64.
    """
    size = options.chunk or max(1, CHUNK_BYTES // (4 * vocabulary))
    if not head_trains:
        return _FrozenHead.apply(hidden, labels, logits_of, options, size, product)  # type: ignore[no-any-return,no-untyped-call]

    def scores(rows: Tensor, wanted: Tensor) -> Tensor:
        return token_scores(logits_of(rows), wanted, options)

    chunks = zip(torch.split(hidden, size), torch.split(labels, size), strict=True)
    return torch.cat([checkpoint(scores, *chunk, use_reentrant=False) for chunk in chunks])


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        logits_of: Callable[[Tensor], Tensor],
        options: ForwardOptions,
        size: int,
        product: bool,
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        scores: list[Tensor] = []
        grad_hidden: list[Tensor] = []
        for rows, wanted in zip(torch.split(hidden, size), torch.split(labels, size), strict=True):
            rows = rows.detach().requires_grad_(wants_gradient)
            with torch.set_grad_enabled(wants_gradient):
                logits = logits_of(rows)
            by_product = options.entropy and product and wants_gradient and logits.dtype.itemsize >= 4
            rest = replace(options, entropy=False) if by_product else options
            columns, grad_logits = _scores_and_gradient(logits.detach(), wanted, rest, wants_gradient)
            scores.append(columns)
            if grad_logits is not None:
                grad_hidden += torch.autograd.grad(logits, rows, grad_logits)
            if by_product:
                columns[:, ENTROPY] = torch.linalg.vecdot(rows.detach(), grad_hidden[-1]) - columns[:, LOGP]
        if grad_hidden:
            ctx.save_for_backward(torch.cat(grad_hidden))
        return torch.cat(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return (gradient[:, LOGP, None] * grad_hidden).to(grad_hidden.dtype), None, None, None, None, None


def _scores_and_gradient(
    logits: Tensor, labels: Tensor, options: ForwardOptions, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """`token_scores`, and onehot(label) − π; takes one buffer of the logits' size, or two; overwrites fp32."""
    dtype = logits.dtype
    values = at_least_fp32(logits)
    mean = values.mean(dim=-1)
    picked = values.gather(1, labels[:, None])[:, 0]
    highest = values.amax(dim=-1, keepdim=True)
    values.sub_(highest)
    powers = values.exp() if options.entropy else values.exp_()
    total = powers.sum(dim=-1, keepdim=True)
    nothing = torch.zeros_like(mean)
    entropy = collision = nothing
    if options.entropy:  # log Z − Σ π(v) (logit − max), which needs no logarithm of each probability
        entropy = total[:, 0].log() - torch.linalg.vecdot(powers, values) / total[:, 0]
    values = powers.div_(total)
    if options.wpo:
        collision = 2 * torch.linalg.vector_norm(values, dim=-1).log()
    scores = torch.stack([picked - (highest + total.log())[:, 0], mean, collision, entropy], dim=1)
    if not wants_gradient:
        return scores, None
    values.neg_().scatter_add_(1, labels[:, None], torch.ones_like(values[:, :1]))
    return scores, values.to(dtype)


def token_scores(logits: Tensor, labels: Tensor, options: ForwardOptions) -> Tensor:
    """Score labels by their logits, (tokens, columns); only the first column has a gradient.

    Args:
        logits: (tokens, vocabulary), any float dtype; taken to fp32 first. TRL 1.9 to 1.14 takes the log-softmax and
            its sum in the model's dtype: in bf16, rewards move in steps of 0.05 (trl/trainer/dpo_trainer.py:1348).
        labels: (tokens,).
        options: Which columns are wanted; others are 0.
    """
    values = at_least_fp32(logits)
    normaliser = values.logsumexp(dim=-1)
    logps = values.gather(1, labels[:, None])[:, 0] - normaliser
    with torch.no_grad():
        nothing = torch.zeros_like(logps)
        collision = (2 * values).logsumexp(dim=-1) - 2 * normaliser if options.wpo else nothing
        entropy = torch.special.entr((values - normaliser[:, None]).exp()).sum(dim=-1) if options.entropy else nothing
        rest = values.mean(dim=-1), collision, entropy
    return torch.stack([logps, *rest], dim=1)


def at_least_fp32(values: Tensor) -> Tensor:
    """Cast values to fp32, unless they are finer."""
    return values if values.dtype == torch.float64 else values.float()
