"""The end of ``make demo-real``: how often each adapter follows the instructions of the held-out prompts.

Four answers to each are drawn as those of the pairs were (temperature 0.6, at most 64 tokens), by plain transformers
and PEFT, and judged by IFEval's checkers (the scorer ``rule``).

    python examples/real/measure.py outputs/real dpo [other adapters of that folder]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from math import log, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from dpo_plugin.samples.scorers import rule

sys.path.insert(0, str(Path(__file__).parents[1]))
from demo import history

REFERENCE, DRAWN = "sft", 4


def answers(base: Path, adapter: Path, questions: list[str], at_once: int = 64) -> list[list[str]]:
    """`DRAWN` answers of base + adapter to each question, drawn as those of the pairs."""
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    model = model.merge_and_unload().eval()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    asked = [[{"role": "user", "content": question}] for question in questions for _ in range(DRAWN)]
    found: list[str] = []
    torch.manual_seed(0)
    for start in range(0, len(asked), at_once):
        batch = tokenizer.apply_chat_template(
            asked[start : start + at_once],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            padding=True,
        )
        with torch.no_grad():
            ids = model.generate(
                **batch, do_sample=True, temperature=0.6, top_k=0, top_p=1.0, max_new_tokens=64, **ends
            )
        found += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    texts = [answer.strip() for answer in found]
    return [texts[start : start + DRAWN] for start in range(0, len(texts), DRAWN)]


def followed(rows: list[dict[str, Any]], found: list[list[str]]) -> list[float]:
    """Share of each prompt's answers that follow its instruction."""
    return [mean(rule(row["prompt"], one, row) for one in some) for row, some in zip(rows, found, strict=True)]


def share(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval (normal approximation, of the prompts)."""
    return mean(values), 1.96 * stdev(values) / sqrt(len(values))


def followed_table(rows: list[dict[str, Any]], scores: Mapping[str, list[float]]) -> Table:
    """Share of instructions that each adapter follows: by instruction, in all, and against the reference."""
    table = Table("instruction", *scores, title=f"Instructions followed, {len(rows)} held-out prompts")
    for source in dict.fromkeys(row["source"] for row in rows):
        own = [number for number, row in enumerate(rows) if row["source"] == source]
        table.add_row(source, *(f"{mean(of[number] for number in own):.2f}" for of in scores.values()))
    table.add_section()
    table.add_row("all", *("{:.3f} ± {:.3f}".format(*share(of)) for of in scores.values()))
    against = [[a - b for a, b in zip(of, scores[REFERENCE], strict=True)] for of in scores.values()]
    table.add_row("above the SFT adapter", *("{:+.3f} ± {:.3f}".format(*share(of)) for of in against))
    return table


def answers_table(rows: list[dict[str, Any]], found: Mapping[str, list[list[str]]]) -> Table:
    """One prompt of each instruction with everyone's first answer."""
    table = Table("prompt", *found, title="The first answer that was drawn", show_lines=True)
    sources = [row["source"] for row in rows]
    for turn, source in enumerate(dict.fromkeys(sources)):
        own = [number for number, other in enumerate(sources) if other == source]
        number = own[turn % len(own)]
        table.add_row(rows[number]["prompt"], *(of[number][0] for of in found.values()))
    return table


def main() -> int:
    """Print both tables, write them as JSON; exit 1 if the run is not what the README promises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("adapters", nargs="+")
    arguments = parser.parse_args()
    disable_progress_bar()
    folder = arguments.folder
    rows = [json.loads(line) for line in (folder / "prompts_heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [row["prompt"] for row in rows]
    found = {name: answers(folder / "smollm2", folder / name, asked) for name in (REFERENCE, *arguments.adapters)}
    scores = {name: followed(rows, of) for name, of in found.items()}
    console = Console(soft_wrap=True)
    console.print(followed_table(rows, scores))
    console.print(answers_table(rows, found))
    (folder / "measured.json").write_text(json.dumps({"scores": scores, "answers": found}, indent=1), encoding="utf-8")

    name = arguments.adapters[0]
    lines = [line for line in history(folder / name) if "loss" in line]
    gain, half = share([a - b for a, b in zip(scores[name], scores[REFERENCE], strict=True)])
    displaced = lines[-1]["logps/chosen_displacement"]
    console.print(
        f"{name}: {gain:+.3f} ± {half:.3f} above the SFT adapter; chosen moved by {displaced:+.3f} nats/token"
    )
    promised = {
        "DPO's own loss is ln 2 at step 1": abs(lines[0]["loss/sigmoid"] - log(2)) <= 1e-4,
        "0.1 or more above the SFT adapter, and above chance": gain >= 0.1 and gain > half,
        "chosen log-probs have not fallen by 0.2 nats per token": displaced >= -0.2,
    }
    for promise, kept in promised.items():
        console.print(f"{'yes' if kept else 'NO '}  {promise}")
    console.print(f"Report of the run, to open in a browser: {(folder / name / 'report.html').resolve()}")
    return 0 if all(promised.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
