"""The end of ``make demo``: what the run did, in one table, and what it changed, in three answers.

python examples/demo.py outputs/tiny-base outputs/tiny-sft outputs/tiny-dpo
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from dpo_plugin.data.audit import audit_lines

# From the preference set; a model of two million parameters knows little else.
QUESTIONS = [
    "Are you open on Sunday?",
    "Should I add oil to pasta water?",
    "Why is the sky blue?",
]
COURTEOUS = ("happy to help", "good question", "of course", "certainly", "thanks for asking")
"""How preferred answers begin."""


def history(output_dir: Path) -> list[dict[str, Any]]:
    """Log lines of the run, from its last checkpoint."""
    checkpoints = sorted(output_dir.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    state = json.loads((checkpoints[-1] / "trainer_state.json").read_text(encoding="utf-8"))
    lines: list[dict[str, Any]] = state["log_history"]
    return lines


def numbers(lines: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The first and last training line and the last evaluation."""
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    return training[0], training[-1], evaluations[-1]


def result_table(first: dict[str, Any], last: dict[str, Any], held_out: dict[str, Any]) -> Table:
    """Loss, accuracy and margin at the first and last step and on held-out pairs."""
    table = Table(title="DPO from the SFT adapter")
    columns = ["", f"step {first['step']}", f"step {last['step']}", "held-out"]
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for label, key in (("loss", "loss"), ("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):
        table.add_row(label, f"{first[key]:.4f}", f"{last[key]:.4f}", f"{held_out[f'eval_{key}']:.4f}")
    return table


def answers(base: Path, adapter: Path, questions: list[str]) -> list[str]:
    """Greedy answers of base + adapter, loaded with plain PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    found = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            ids = model.generate(**prompt, do_sample=False, max_new_tokens=48)
        found.append(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def main() -> int:
    """Print table and answers; exit 1 if the run is not what the README promises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "sft", "dpo"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    disable_progress_bar()
    audit = json.loads((arguments.dpo / "data_audit.json").read_text(encoding="utf-8"))
    first, last, held_out = numbers(history(arguments.dpo))
    console = Console(soft_wrap=True)
    console.print("\n".join(["Data audit", *audit_lines(audit["datasets"])]), highlight=False, markup=False)
    console.print(result_table(first, last, held_out))
    table = Table(
        "question", "reference (SFT adapter)", "policy (DPO adapter)", title="Greedy answers", show_lines=True
    )
    reference, policy = (answers(arguments.base, adapter, QUESTIONS) for adapter in (arguments.sft, arguments.dpo))
    for row in zip(QUESTIONS, reference, policy, strict=True):
        table.add_row(*row)
    console.print(table)
    console.print(f"The DPO adapter is in {arguments.dpo}; load it with PEFT, or merge it with axolotl merge-lora.")
    promised = {
        "first loss is ln 2": abs(first["loss"] - 0.6931) <= 1e-4,
        "first margin is 0": abs(first["rewards/margins"]) <= 1e-4,
        "held-out accuracy is 0.9 or more": held_out["eval_rewards/accuracies"] >= 0.9,
        "the policy is courteous": all(answer.lower().startswith(COURTEOUS) for answer in policy),
        "the reference is not": not any(answer.lower().startswith(COURTEOUS) for answer in reference),
    }
    for promise, kept in promised.items():
        console.print(f"{'yes' if kept else 'NO '}  {promise}")
    console.print(f"Report of the run, to open in a browser: {(arguments.dpo / 'report.html').resolve()}")
    return 0 if all(promised.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
