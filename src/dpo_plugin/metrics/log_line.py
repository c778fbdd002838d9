"""A log line for people: what matters at each logging step, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN = {
    "loss": "loss {:.4f}",
    "rewards/accuracies": "accuracy {:.2f}",
    "rewards/margins": "margin {:+.3f}",
    "rewards/chosen": "chosen {:+.3f}",
    "rewards/rejected": "rejected {:+.3f}",
    "grad_norm": "grad {:.3g}",
    "learning_rate": "lr {:.1e}",
    "speed/pairs_per_second": "{:.3g} pairs/s",
    "samples_per_second": "{:.3g} pairs/s",
}
"""Field → how it is shown, if the line has it."""


def summary(line: Mapping[str, Any], step: int, steps: int, time: str = "") -> str:
    """Shorten a line of the log for people.

    Args:
        line: Fields of a training step, of an evaluation, or of the end of a run.
        step: The step.
        steps: How many are planned; 0 in an evaluation without training.
        time: What to say of the run's time at the end of a training step's line.

    Returns:
        A line without a newline; empty if there is nothing in it that is shown.
    """
    if "train_runtime" in line:
        pairs = f", {line['train_samples_per_second']:.3g} pairs/s" if "train_samples_per_second" in line else ""
        return f"{step} steps in {duration(line['train_runtime'])}{pairs}"
    prefix = next(
        (name.removesuffix("loss") for name in line if name.startswith("eval_") and name.endswith("loss")), ""
    )
    unranked = {"rewards/accuracies"} if line.get(f"{prefix}rewards/margins") == 0 else set()  # before the first update
    single = [f"{name.rpartition('/')[2]} {line[name]:.4f}" for name in line if name.startswith(f"{prefix}loss/")]
    shown = [
        text.format(line[prefix + name]) + (f" ({', '.join(single)})" if name == "loss" and single else "")
        for name, text in SHOWN.items()
        if prefix + name in line and name not in unranked
    ]
    if not shown:
        return ""
    held_out = [prefix.replace("eval", "held-out", 1).rstrip("_")] if prefix else []
    where = [f"step {step:>{len(str(steps))}}/{steps}"] if steps else []
    return "  ".join([*where, *held_out, *shown, *([time] if time and not held_out else [])])


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
