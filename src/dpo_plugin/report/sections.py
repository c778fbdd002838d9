"""The parts of a report besides its curves, as plain values for the page's template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dpo_plugin.health.history import History
from dpo_plugin.metrics.fields import explain
from dpo_plugin.metrics.log_line import duration
from dpo_plugin.report.page import flat, number, shown
from dpo_plugin.report.panels import ranked
from dpo_plugin.report.run_folder import RunRecord
from dpo_plugin.report.shown import shown_text

PROMPTS_SHOWN = 30


def last(history: History, name: str) -> float | None:
    """The last logged value of a field; of an accuracy, after the first update."""
    tail = ranked(history, name).tail(1)
    return tail[0][1] if tail else None


def about(run: RunRecord) -> dict[str, str]:
    """What was trained against what, on what and for how long."""
    facts, runtime = run.history.facts, last(run.history, "train_runtime")
    found = {
        "base": facts.base or run.config.get("base_model"),
        "adapter": facts.policy or run.config.get("lora_model_dir"),
        "reference": facts.reference,
        "β": facts.beta,
        "rate": run.history.rate() or None,
        "pairs": facts.pairs,
        "duration": None if runtime is None else duration(runtime),
        "hardware": facts.hardware,
    }
    return {name: shown_text(shown(value, name)) for name, value in found.items() if value is not None}


def fields(history: History) -> list[dict[str, str]]:
    """Every logged field with its last values and what it means."""
    found = []
    for name in sorted({name.removeprefix("eval_") for name in history.names()}):
        values = {"": last(history, name), "held out ": last(history, f"eval_{name}")}
        written = ", ".join(f"{which}{shown(value, name)}" for which, value in values.items() if value is not None)
        found.append({"name": name, "figures": written, "sentence": explain(name)})
    return found


def data_set(audit: Mapping[str, Any]) -> dict[str, Any]:
    """What became of the rows of a data set, how long its pairs are, and where they come from."""
    lengths, sources = audit.get("lengths") or {}, audit.get("by_source") or {}
    sides = [name for name in ("prompt", "chosen", "rejected") if name in lengths]
    left_out = (audit.get("left_out") or {}).items()
    return {
        "where": shown_text(f"{audit.get('where', '')} {audit.get('path', '')}".strip()),
        **{name: audit.get(name) for name in ("read", "kept", "cut")},
        "left_out": ", ".join(f"{reason} {number(count)}" for reason, count in left_out),
        "longer": lengths.get("chosen_longer"),
        "by": lengths.get("chosen_minus_rejected"),
        "lengths": [(side, [lengths[side].get(share) for share in ("p50", "p95", "max")]) for side in sides],
        "sources": [(name or "(none)", [found.get("kept", 0)]) for name, found in sources.items()]
        if len(sources) > 1
        else [],
    }


def prompts(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Prompts by their last answer, the latest first, each with its answers, the latest first."""
    found: dict[str, dict[str, Any]] = {}
    for sample in samples:
        user = str(sample.get("question") or sample["prompt"])  # the whole prompt where the turn is not told apart
        given = [
            (name, _plain(value))
            for name, value in sample.items()
            if name not in ("prompt", "question", "step") and value is not None
        ]
        answers = found.pop(user, {"answers": []})["answers"]
        found[user] = {"user": user, "answers": [(sample.get("step"), given), *answers]}
    return list(found.values())[::-1]


def _plain(value: Any) -> str:
    """An answer as its text and reward; numbers in three digits."""
    if isinstance(value, Mapping) and "text" in value:
        reward = value.get("reward")
        return f"{value['text']}" + (f"\n\nreward {number(reward)}" if isinstance(reward, float) else "")
    return number(value) if isinstance(value, float) else str(value)


def settings_of(run: RunRecord) -> dict[str, str]:
    """The run's config, or where it was not written what else is known of its settings."""
    return flat(run.config) or flat(asdict(run.history.facts))
