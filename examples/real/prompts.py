"""Write the prompts of ``make demo-real``: each question with each instruction, as ``axolotl dpo pairs`` reads them.

python examples/real/prompts.py outputs/real    # prompts.jsonl (192) and prompts_heldout.jsonl (96)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

WRITTEN = Path(__file__).with_name("prompts.yaml")
FILES = {"training": "prompts.jsonl", "held_out": "prompts_heldout.jsonl"}


def rows(topics: Mapping[str, list[str]], instructions: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row per question and instruction; ``source`` is the instruction, so that metrics are shown by it."""
    questions = [question for asked in topics.values() for question in asked]
    for turn, question in enumerate(questions):
        for instruction in instructions:
            wordings, arguments = instruction["wordings"], instruction.get("arguments", {})
            yield {
                "prompt": f"{question} {wordings[turn % len(wordings)]}",
                "instruction_id_list": [instruction["id"]],
                "kwargs": [arguments],
                "source": " ".join([instruction["id"].split(":")[1], *map(str, list(arguments.values())[:1])]),
            }


def main() -> None:
    """Write both files into the folder that is named."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    written = yaml.safe_load(WRITTEN.read_text(encoding="utf-8"))
    for part, name in FILES.items():
        lines = [json.dumps(row) for row in rows(written[part], written["instructions"])]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
