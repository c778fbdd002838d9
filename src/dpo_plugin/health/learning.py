"""Rules of the built-in health checks about learning: whether a run learns, and what it learns.

Thresholds, windows and advice are in `dpo_plugin.health.checks`. A rule gets the history and its check and reads only
the last lines.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import stdev

from dpo_plugin.health.history import History, Points, Series, mean
from dpo_plugin.health.monitor import Check, Symptom, scaled_rate, short

LN2 = math.log(2)

AT_LN2 = 0.002
"""Nats within which a loss counts as ln 2; a mean margin of 0.004 moves it that far."""

EARLY = 5
"""Log lines that stand for the start of a run in which nothing was measured at step 0."""


def loss_diverged(history: History, check: Check) -> Symptom | None:
    """The mean of the last losses over the loss at first."""
    times = _times_first_loss(history, check.window)
    if times is None or times < check.threshold:
        return None
    tail = history["loss"].tail(check.window)
    level = mean(tail)
    message = f"the loss is {level:.3g} over the last {len(tail)} log lines, {times:.1f} times what it was at first"
    first_step = next(step for step, value in tail if value >= level / times * check.threshold)
    return Symptom(first_step, message, {"loss": level, "times": times}, scaled_rate(history, 0.1))


def _times_first_loss(history: History, window: int) -> float | None:
    tail, first = history["loss"].full_tail(window), _first_loss(history)
    return mean(tail) / first if tail and first > 0 else None


def _first_loss(history: History) -> float:
    """The loss before training; ln 2 where it is the sigmoid one and policy and reference agree.

    Otherwise the mean of the first lines, or the very first line if that is higher, since the loss may already fall
    within them. Where ln 2 is not certain, a start above it counts.
    """
    first = history["loss"].head(EARLY)
    if not first:
        return 0.0
    if tuple(history.facts.losses) in ((), ("sigmoid",)) and history.facts.starts_as_reference is not False:
        return max(LN2, min(value for _, value in first))
    return max(mean(first), first[0][1])


def _away_from(history: History, otherwise: str) -> str:
    """The line to write: a lower learning rate where the loss is above its start, ``otherwise`` if it is not."""
    return scaled_rate(history, 0.1) if (_times_first_loss(history, 10) or 0) > 1.1 else otherwise


def loss_at_ln2(history: History, check: Check) -> Symptom | None:
    """The mean of the last losses, where the loss is the sigmoid one."""
    tail = _lines_at_ln2(history, check.window, check.threshold)
    if not tail:
        return None
    message = f"the loss stays at ln 2 = 0.6931 (mean {mean(tail):.4f} of the last {len(tail)} log lines)"
    usual = 5e-7 if (history.facts.trainable_share or 0) > 0.5 else 1e-5
    suggestion = f"learning_rate: {max(10 * history.rate(), usual):.1g}"
    return Symptom(tail[0][0], message, {"loss": mean(tail)}, suggestion)


def _lines_at_ln2(history: History, window: int, threshold: float) -> Points:
    """The last log lines, if the sigmoid loss has not moved in them although the learning rate should have moved it."""
    if tuple(history.facts.losses) not in ((), ("sigmoid",)):
        return []
    few = history["loss"].tail(8)
    if len(few) == 8 and history.full_rate_steps() >= 5 and all(abs(value - LN2) < 5e-5 for _, value in few):
        return few  # ln 2 to four digits: nothing at all reaches the model, which needs no long look
    tail = history["loss"].full_tail(window)
    if tail is None or not history.learned_enough(0.15):
        return []
    noise = stdev(value for _, value in tail)
    return tail if abs(mean(tail) - LN2) < threshold and noise < 5 * threshold else []


def margin_not_rising(history: History, check: Check) -> Symptom | None:
    """The mean of the last margins in standard errors."""
    tail = history["rewards/margins"].full_tail(check.window)
    if tail is None or history.facts.starts_as_reference is False or not history.learned_enough(0.25):
        return None
    level, error = mean(tail), stdev(value for _, value in tail) / math.sqrt(len(tail))
    if level > check.threshold * error:
        return None
    if _lines_at_ln2(history, check.window, AT_LN2):
        return None  # loss_at_ln2 says the same, and more
    beta = history.facts.beta or 0.0
    message = f"the margin is not above 0 (mean {short(level)} ± {short(error)} over the last {len(tail)} log lines)"
    suggestion = _away_from(history, "rl_beta: 0.1" if beta > 0.3 else scaled_rate(history, 5))
    return Symptom(tail[0][0], message, {"rewards/margins": level, "standard error": error}, suggestion)


def accuracy_at_chance(history: History, check: Check) -> Symptom | None:
    """The best of the last held-out accuracies."""
    tail = history["eval_rewards/accuracies"].full_tail(check.window)
    if tail is None or not history.learned_enough(0.33) or tail[0][0] == 0:
        return None
    best = max(value for _, value in tail)
    pairs = max(1.0, (history["eval_rewards/count"].tail(1) or [(0, math.inf)])[0][1])
    if best >= min(check.threshold, 0.6 - 0.5 / math.sqrt(pairs)):  # 0.6 must be a standard error away: small sets
        return None
    level = "no better" if best > 0.45 else "worse"
    message = (
        f"at most {best:.0%} of the held-out pairs are ranked right at the last {check.window} evaluations, {level} "
        "than chance"
    )
    suggestion = _away_from(history, scaled_rate(history, 5))
    return Symptom(tail[0][0], message, {"eval_rewards/accuracies": best}, suggestion)


def likelihood_displacement(history: History, check: Check) -> Symptom | None:
    """How far the log-probs of chosen and rejected have fallen since step 0."""
    chosen = history["logps/chosen_displacement"].full_tail(check.window)
    rejected = history["logps/rejected_displacement"].full_tail(check.window)
    if chosen is None or rejected is None or mean(chosen) > -check.threshold or mean(rejected) > 0:
        return None
    numbers = {"chosen": mean(chosen), "rejected": mean(rejected)}
    message = (
        f"the log-probability of chosen has fallen by {-numbers['chosen']:.2f} nats per token, of rejected by "
        f"{-numbers['rejected']:.2f}"
    )
    suggestion = _away_from(history, "dpo_loss_type: [sigmoid, sft] and dpo_loss_weights: [1.0, 0.2]")
    first_step = next(step for step, value in chosen if value <= -check.threshold)
    return Symptom(first_step, message, numbers, suggestion)


RISES = 4
"""Rises of the held-out loss in a row that chance does not explain: one order of five values in 120."""


def overfitting(history: History, check: Check) -> Symptom | None:
    """The held-out loss against its minimum, once the training pairs are all ranked right."""
    losses, train = history["eval_loss"], history["rewards/accuracies"].full_tail(check.window)
    if train is None or len(losses) < 3 or mean(train) < 0.95:
        return None
    last_step, last = losses.tail(1)[0]
    best = min(range(len(losses)), key=losses.values.__getitem__)
    lowest, at = losses.values[best], losses.steps[best]
    if not _has_risen(losses, lowest, check.threshold) or _ranks_better(history, best):
        return None
    message = (
        f"{mean(train):.0%} of the training pairs are ranked right, and the held-out loss has risen from "
        f"{lowest:.4f} at step {at} to {last:.4f} at step {last_step}"
    )
    return Symptom(at, message, {"eval_loss": last, "lowest": lowest}, _less_capacity(history))


def _has_risen(losses: Series, lowest: float, share: float) -> bool:
    """Whether the last two are above the minimum, the last by the share, or by half of it after a steady rise."""
    *_, before, last = losses.values
    tail = losses.values[-RISES - 1 :]
    steady = len(tail) > RISES and all(one < other for one, other in pairwise(tail))
    by = max((share / 2 if steady else share) * lowest, 0.02)
    return before > lowest and last > lowest + by


def _ranks_better(history: History, best: int) -> bool:
    """Whether accuracy is higher than at the minimum of the loss, by more than its standard error √(1/4n).

    Chance is the floor: at step 0 nothing is ranked and accuracy is 0.
    """
    accuracy, losses = history["eval_rewards/accuracies"], history["eval_loss"]
    if len(accuracy) != len(losses):
        return False
    pairs = (history["eval_rewards/count"].tail(1) or [(0, math.inf)])[0][1]
    return accuracy.values[-1] > max(0.5, accuracy.values[best]) + 0.5 / math.sqrt(max(1.0, pairs))


def _less_capacity(history: History) -> str:
    if (history.facts.trainable_share or 0) > 0.5:
        return "adapter: lora"
    if (history.facts.epochs or 1) > 1:
        return "num_epochs: 1"
    return f"lora_r: {max(4, (history.facts.lora_r or 16) // 2)}"


def length_exploitation(history: History, check: Check) -> Symptom | None:
    """Whether length, and not preference, decides which answer has the higher reward."""
    names = ("lengths/margin_correlation", "lengths/accuracy_chosen_shorter", "lengths/accuracy_chosen_longer")
    tails = [history[name].full_tail(check.window) for name in names]
    if any(tail is None for tail in tails) or not history.learned_enough(0.15):
        return None
    correlation, shorter, longer = (mean(tail) for tail in tails if tail is not None)
    if correlation < check.threshold or shorter > 0.45 or longer < 0.6:
        return None
    message = (
        f"the margin correlates with length ({correlation:.2f}): {longer:.0%} of the pairs with the longer "
        f"chosen are ranked right, {shorter:.0%} of those with the shorter"
    )
    numbers = dict(zip(names, (correlation, shorter, longer), strict=True))
    return Symptom((tails[0] or [(0, 0.0)])[0][0], message, numbers, "dpo_loss_type: [sigmoid_norm]")


def saturated(history: History, check: Check) -> Symptom | None:
    """The share of pairs that give no gradient any more, while the run goes on."""
    tail = history["rewards/saturated"].full_tail(check.window)
    progress = history.progress()
    if tail is None or progress is None or progress > 0.75 or mean(tail) < check.threshold:
        return None
    message = (
        f"{mean(tail):.0%} of the pairs have σ(margin) > 0.99 and give no gradient any more, "
        f"with {1 - progress:.0%} of the steps to go"
    )
    suggestion = "num_epochs: 1" if (history.facts.epochs or 1) > 1 else scaled_rate(history, 0.5)
    return Symptom(tail[0][0], message, {"rewards/saturated": mean(tail)}, suggestion)
