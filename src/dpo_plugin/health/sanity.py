"""Rules of the built-in health checks about a run's soundness: data, start, numbers, precision, reference.

Thresholds, windows and advice are in `dpo_plugin.health.checks`. A rule gets the history and its check and reads only
the last lines. A reward divided by β is a log-ratio in nats.
"""

from __future__ import annotations

import math
from statistics import median

from dpo_plugin.health.history import History
from dpo_plugin.health.monitor import Check, Symptom, scaled_rate, short

# ── data ──


def no_completion_tokens(history: History, check: Check) -> Symptom | None:
    """The mean completion length of a side, or where it is not logged both log-probs, in the last lines."""
    names = [name for name in ("lengths/chosen", "lengths/rejected") if name in history]
    for name in names:
        tail = history[name].tail(check.window)
        empty = [(step, value) for step, value in tail if value < check.threshold]
        if empty:
            side = name.removeprefix("lengths/")
            message = f"{empty[-1][1]:.2g} completion tokens of {side} are left on average"
            return Symptom(empty[0][0], message, {name: empty[-1][1]}, _longer_sequences(history))
    if names:
        return None
    sides = [history[name].full_tail(check.window) for name in ("logps/chosen", "logps/rejected")]
    if all(side is not None and all(value == 0 for _, value in side) for side in sides):
        message = "the log-probabilities of chosen and rejected are exactly 0: no completion token is left"
        return Symptom((sides[0] or [(0, 0.0)])[0][0], message, {"logps/chosen": 0.0}, _longer_sequences(history))
    return None


def mostly_cut(history: History, check: Check) -> Symptom | None:
    """The share of pairs that the audit counts as cut or left out for length."""
    for audit in history.audits:
        kept, cut = int(audit.get("kept") or 0), int(audit.get("cut") or 0)
        left_out = audit.get("left_out") or {}
        long = sum(int(left_out.get(reason, 0)) for reason in ("too long", "identical after the cut"))
        share = (cut + long) / max(1, kept + long)
        if share > check.threshold:
            where = f"{audit.get('where', 'the data')} {audit.get('path', '')}".strip()
            message = f"{share:.0%} of the pairs of {where} are cut or left out because of their length"
            return Symptom(0, message, {"cut": cut, "left out": long, "kept": kept}, _longer_sequences(history))
    return None


def _longer_sequences(history: History) -> str:
    fitting = max((int(audit.get("sequence_len_for_95_percent") or 0) for audit in history.audits), default=0)
    now = history.facts.sequence_len or 0
    return f"sequence_len: {fitting if fitting > now else max(2048, 4 * now)}"


# ── start and numbers ──


def step_zero(history: History, check: Check) -> Symptom | None:
    """The log-ratios of the first lines, if they come from before the first update."""
    if not history.facts.starts_as_reference or not history.facts.beta:
        return None
    for prefix, step in (("", 1), ("eval_", 0)):
        for side in ("chosen", "rejected"):
            first = history[f"{prefix}rewards/{side}"].head(1)
            nats = first[0][1] / history.facts.beta if first and first[0][0] <= step else 0.0
            if abs(nats) > check.threshold:
                message = f"before the first update policy and reference differ by {short(nats)} nats on {side}"
                suggestion = "dpo_plugin: {reference: {adapter_dir: <the SFT adapter>}}"
                return Symptom(first[0][0], message, {f"logratios/{side}": nats}, suggestion)
    return None


_MUST_BE_FINITE = ("loss", "grad_norm", "logps/", "rewards/", "eval_loss", "eval_logps/", "eval_rewards/")


def not_finite(history: History, check: Check) -> Symptom | None:
    """NaN and infinity in any line so far."""
    seen = {name: found for name, found in history.not_finite.items() if name.startswith(_MUST_BE_FINITE)}
    if "grad_norm" in seen and seen["grad_norm"][1] < check.threshold:
        del seen["grad_norm"]  # under fp16 a single overflow is skipped and harmless
    if not seen:
        return None
    name = min(seen, key=lambda name: seen[name][0])
    step, lines = seen[name]
    message = f"`{name}` is NaN or infinite at step {step}"
    suggestion = "bf16: true" if history.facts.adapter_dtype == "float16" else scaled_rate(history, 0.2)
    return Symptom(step, message, {"log lines": lines}, suggestion)


def gradient_vanished(history: History, check: Check) -> Symptom | None:
    """The largest of the last gradient norms."""
    tail = history["grad_norm"].full_tail(check.window)
    if tail is None or max(value for _, value in tail) > check.threshold:
        return None
    message = f"the gradient norm is {short(tail[-1][1])}: nothing is learned"
    return Symptom(tail[0][0], message, {"grad_norm": tail[-1][1]}, "lora_target_linear: true")


def gradient_exploded(history: History, check: Check) -> Symptom | None:
    """How many of the last gradient norms are far above the first ones."""
    series = history["grad_norm"]
    if len(series) < 10 + check.window:
        return None
    usual = max(max(value for _, value in series.head(10)), 1e-3)
    high = [(step, value) for step, value in series.tail(check.window) if value > check.threshold * usual]
    if len(high) <= check.window // 2:
        return None
    now = median(value for _, value in high)
    message = f"the gradient norm is {short(now)}, at most {short(usual)} in the first ten log lines"
    return Symptom(high[0][0], message, {"grad_norm": now, "at first": usual}, scaled_rate(history, 0.2))


# ── precision and reference ──


def _significant_bits(value: float) -> int:
    """Count the binary digits of a number: at most 8 in bf16, 24 in fp32."""
    mantissa = int(math.frexp(abs(value))[0] * 2**53)
    return 53 - ((mantissa & -mantissa).bit_length() - 1) if mantissa else 0


def quantised(history: History, check: Check) -> Symptom | None:
    """The most binary digits that a reward of the last lines has."""
    tail = [*history["rewards/chosen"].tail(check.window), *history["rewards/rejected"].tail(check.window)]
    values = [(step, value) for step, value in tail if value]
    if len(values) < check.window or any(_significant_bits(value) > check.threshold for _, value in values):
        return None
    bits = max(_significant_bits(value) for _, value in values)
    message = f"rewards have {bits} binary digits, as bf16 has 8 and fp32 24: small differences are rounded away"
    return Symptom(min(values)[0], message, {"binary digits": bits}, "plugins: [dpo_plugin.DPOPlugin]")


_PAST_NOISE = 10
"""Steps at the peak rate after which a value that an optimizer can move has moved."""


_MASTERS = "dpo_plugin: {compute: {master_weights: true}}"


def rate_below_precision(history: History, check: Check) -> Symptom | None:
    """The share of the values held by the optimizer that have moved at all since the start."""
    changed = history["weights/changed"].tail(1)
    if not changed or changed[0][1] >= check.threshold or history.full_rate_steps() < _PAST_NOISE:
        return None
    step, share = changed[0]
    dtype = history.facts.adapter_dtype
    message = (
        f"{share:.1%} of the trained values have changed in {step} steps; updates of about {short(history.rate())} are "
        f"rounded away{f', since the optimizer holds the weights in {dtype}' if dtype else ''}"
    )
    narrow = history.facts.lora_r is None and "bfloat16" in (dtype or "")
    suggestion = _MASTERS if narrow else scaled_rate(history, 10)
    return Symptom(step, message, {"weights/changed": share, "learning_rate": history.rate()}, suggestion)


def reference_drift(history: History, check: Check) -> Symptom | None:
    """The reference's log-prob of the same held-out data over time."""
    # log π_ref of the held-out chosen completions, which are the same at each evaluation.
    beta = history.facts.beta
    policy, rewards = history["eval_logps/chosen"], history["eval_rewards/chosen"]
    if not beta or not history.facts.reference_fixed or len(policy) < 2 or len(policy) != len(rewards):
        return None
    first, last = (policy.values[at] - rewards.values[at] / beta for at in (0, -1))
    if abs(last - first) <= check.threshold * max(abs(first), 1.0):
        return None
    message = f"the reference's log-probability of the held-out data was {first:.4g} nats and is {last:.4g}"
    suggestion = "dpo_plugin: {reference: {strategy: adapter}}"
    return Symptom(policy.steps[-1], message, {"first": first, "last": last}, suggestion)
