"""The model card of a DPO adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from dpo_plugin.data.audit import audit_lines
from dpo_plugin.host.callbacks import RunningTrainer
from dpo_plugin.model.adapters import POLICY, PolicyReferenceModel
from dpo_plugin.report.run_folder import AUDIT, objects, read_json
from dpo_plugin.report.shown import shown_text

_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")


def write_card(trainer: RunningTrainer) -> None:
    """Write the card of a finished run into its output folder."""
    settings, model = trainer.settings, trainer.model
    adapter = isinstance(model, PolicyReferenceModel)
    start = "the base model"
    if settings.policy:
        start = f"`{shown_text(str(settings.policy.path))}`, sha256 {model.digests[POLICY]}"
    facts = {
        "policy starts from": start,
        "reference": " ".join(trainer.origin.reference.values()),
        "loss": ", ".join(f"{name} × {weight:g}" for name, weight in trainer.preference_step.weights.items()),
        "beta": trainer.args.beta,
        "learning rate": trainer.args.learning_rate,
        "steps": trainer.state.global_step,
    }
    output_dir = Path(trainer.args.output_dir)
    text = model_card(output_dir, shown_text(str(model.config.name_or_path)), facts, trainer.state.log_history, adapter)
    (output_dir / "README.md").write_text(text, encoding="utf-8")


def model_card(
    output_dir: Path, base: str, facts: Mapping[str, Any], history: Sequence[Mapping[str, Any]], adapter: bool
) -> str:
    """Format the card of an adapter or a whole model in Markdown, with the front matter that the hub reads."""
    library = "peft" if adapter else "transformers"
    front = {"base_model": base, "library_name": library, "tags": ["dpo", "axolotl", "dpo_plugin"]}
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {output_dir.name}", ""]
    what = "adapter for" if adapter else "of"
    lines += [f"DPO {what} `{base}`, trained with axolotl and dpo_plugin {version('dpo-plugin')}.", ""]
    lines += [f"- **{name}**: {value}" for name, value in facts.items()]
    lines += ["", "## Final metrics", "", *_metrics(history)]
    if audits := objects(read_json(output_dir / AUDIT, []).get("datasets")):
        lines += ["", "## Data", "", "```", *audit_lines(audits), "```"]
    return "\n".join(lines) + "\n"


def _metrics(history: Sequence[Mapping[str, Any]]) -> list[str]:
    nothing: Mapping[str, Any] = {}
    train = next((line for line in reversed(history) if "loss" in line), nothing)
    held_out = next((line for line in reversed(history) if "eval_loss" in line), nothing)
    if not train:
        return ["No step was logged."]
    rows = ["| | training, last line | held-out |", "|---|---|---|"]
    for name in _SHOWN:
        values = (train.get(name), held_out.get(f"eval_{name}"))
        rows.append(f"| {name} | " + " | ".join("" if value is None else f"{value:.4f}" for value in values) + " |")
    return rows
