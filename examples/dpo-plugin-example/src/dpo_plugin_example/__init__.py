"""One thing for each hook of dpo_plugin. Copy this package, keep what you need, and rename it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any

from torch import Tensor, relu
from torch.nn.functional import logsigmoid

from dpo_plugin import (
    Columns,
    CompletionLogps,
    Finding,
    Forward,
    History,
    LossOptions,
    LossTraits,
    Message,
    PairBatch,
    PairLogps,
    PreferencePair,
    ReferenceStrategy,
    RowError,
    hookimpl,
)

# ── a format ──


def helpsteer3(row: Mapping[str, Any], columns: Columns) -> PreferencePair:
    """nvidia/HelpSteer3: ``context`` (messages), ``response1``, ``response2``, and which is better.

    ``overall_preference`` goes from −3, the first is much better, to 3, the second is.

    Raises:
        RowError: If something is missing, or the two are as good as each other.
    """
    context, better = row.get("context"), row.get("overall_preference")
    responses = row.get("response1"), row.get("response2")
    if not isinstance(context, list) or not all(isinstance(text, str) for text in responses):
        raise RowError("needs `context`, a list of messages, and the texts `response1` and `response2`")
    if not isinstance(better, int | float) or not better:
        raise RowError(f"`overall_preference` is {better!r}, so neither answer is preferred", reason="tie")
    first, second = ([Message(role="assistant", content=str(text))] for text in responses)
    chosen, rejected = (first, second) if better < 0 else (second, first)
    return PreferencePair(prompt=context, chosen=chosen, rejected=rejected, source=str(row.get("domain") or ""))


@hookimpl
def dpo_preference_formats() -> Mapping[str, Callable[[Mapping[str, Any], Columns], PreferencePair]]:
    """``type: dpo_plugin.helpsteer3``."""
    return {"helpsteer3": helpsteer3}


# ── a reference strategy ──


class HalfwayReference(ReferenceStrategy):
    """Half-way between base and SFT adapter: the geometric mean of their distributions over answers, unnormalised.

    The constant that would normalise it is the same for both answers to a prompt, so it cancels in a margin. It ties
    the policy less to what SFT has taught.
    """

    needs_lora = True  # an adapter that can be switched off
    needs_adapter = True  # which is attached before training starts

    def run(self, model: Any, batch: PairBatch, forward: Forward) -> CompletionLogps:
        """Run both; ``forward`` goes through whatever engine holds the model."""
        with self.policy.reference_active():
            adapter = forward(model, batch)
        with self.policy.adapters_off():
            base = forward(model, batch)
        return replace(adapter, sums=(adapter.sums + base.sums) / 2)

    def identity(self) -> str:
        """The adapter's digest; the cache knows the base model by itself."""
        return f"halfway {self.policy.digests['reference']}"


@hookimpl
def dpo_reference_strategies() -> Mapping[str, type[ReferenceStrategy]]:
    """``dpo_plugin: {reference: {strategy: halfway}}``."""
    return {"halfway": HalfwayReference}


# ── a loss ──

PENALTY = 5.0
"""λ of `dpop`."""


@LossTraits()  # sees each pair alone, takes no label smoothing and no other divergence
def dpop(logps: PairLogps, options: LossOptions) -> Tensor:
    """−log σ(β (r_w − r_l − λ max(0, −r_w))): DPO-Positive (Pal et al. 2024, arXiv 2402.13228). (pairs,).

    r are log-ratios in nats. It keeps the likelihood of chosen from falling below the reference's.
    """
    chosen, rejected = logps.chosen_logratios, logps.rejected_logratios
    return -logsigmoid(options.beta * (chosen - rejected - PENALTY * relu(-chosen)))


@hookimpl
def dpo_losses() -> Mapping[str, Callable[[PairLogps, LossOptions], Tensor]]:
    """``dpo_loss_type: [dpop]``."""
    return {"dpop": dpop}


# ── a metric ──


def chosen_perplexity(logps: PairLogps) -> Tensor:
    """exp(−log π(chosen) / tokens), (pairs,): how many tokens the policy wavers between at each place of chosen."""
    return (-logps.policy_chosen_logps / logps.chosen_tokens.clamp(min=1)).exp()


@hookimpl
def dpo_metrics() -> Mapping[str, Callable[[PairLogps], Tensor]]:
    """Logged in every run unless ``dpo_plugin.metrics`` leaves it out."""
    return {"example/chosen_perplexity": chosen_perplexity}


# ── a health check ──

WINDOW = 10
"""Lines at each end that `slowing_down` compares."""


def slowing_down(history: History) -> Finding | None:
    """Pairs per second have fallen below half of what they were, data and settings being the same."""
    speed = history["speed/pairs_per_second"]
    if len(speed) < 2 * WINDOW:
        return None
    first, last = (fmean(value for _, value in some) for some in (speed.head(WINDOW), speed.tail(WINDOW)))
    if last >= first / 2:
        return None
    return Finding(
        message=f"{last:.3g} pairs per second are trained on, and {first:.3g} were at the start",
        advice="Look for another job on the machine, a GPU that is too hot, or a full disk.",
        first_step=speed.steps[-WINDOW],
        numbers={"speed/pairs_per_second": last},
    )


@hookimpl
def dpo_health_checks() -> Mapping[str, Callable[[History], Finding | None]]:
    """Called with every log line; `axolotl dpo report` calls it for a finished run."""
    return {"slowing_down": slowing_down}


# ── a scorer ──


def json_keys(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
    """Share of the keys in the prompt's ``keys`` that the answer, a JSON object, has; 0 if it is none."""
    try:
        found = json.loads(answer)
    except ValueError:
        return 0.0
    wanted = row.get("keys") or []
    return (
        fmean(key in found for key in wanted) if isinstance(found, dict) and wanted else float(isinstance(found, dict))
    )


@hookimpl
def dpo_scorers() -> Mapping[str, Callable[[str, str, Mapping[str, Any]], float]]:
    """``dpo_plugin: {pairs: {scorer: json_keys}}``, and ``samples.scorer``."""
    return {"json_keys": json_keys}
