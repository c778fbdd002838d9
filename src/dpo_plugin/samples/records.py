"""Samples: policy's and reference's answers to a prompt, as they are kept in a file and shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_plugin.plain_text import markdown, terminal_text


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of one of the two models.

    Attributes:
        text: The answer, without special tokens.
        tokens: Its number of tokens, the one that ended it included.
        ended: Whether the model ended it before ``max_new_tokens``.
        reward: Its implicit reward β (log π − log π_ref) (Rafailov et al. 2023, section 4).
        score: The number that the scorer gave it, or None without one.
    """

    text: str
    tokens: int
    ended: bool
    reward: float
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """The answers of policy and reference to one prompt.

    Attributes:
        step: Optimizer steps done; None outside of training.
        prompt: The prompt as the model reads it, special tokens included.
        policy: The policy's answer.
        reference: The reference's answer, or None if the reference strategy has no model that could answer.
        question: The user's last turn alone, or None where the chat template does not tell it apart.
    """

    step: int | None
    prompt: str
    policy: Answer
    reference: Answer | None
    question: str | None = None

    def row(self) -> list[Any]:
        """Values of `COLUMNS`."""
        other = self.reference
        return [self.prompt, other and other.text, self.policy.text, other and other.reward, self.policy.reward]


COLUMNS = ("prompt", "reference", "policy", "reference_reward", "policy_reward")
"""What trackers show of a sample."""

_SHOWN = 400  # characters of a prompt in the terminal, from its end


def samples_table(samples: Sequence[Sample], title: str) -> Any:
    """Make a rich table: prompt, the reference's answer and the policy's, each with reward and tokens."""
    from rich.table import Column, Table
    from rich.text import Text

    columns = [Column(name, overflow="fold") for name in ("prompt", "reference", "policy")]
    table = Table(*columns, title=title, show_lines=True)
    for sample in samples:
        prompt = sample.prompt if len(sample.prompt) <= _SHOWN else "… " + sample.prompt[-_SHOWN:]
        cells = (_cell(sample.reference), _cell(sample.policy))
        table.add_row(Text(terminal_text(prompt), style="dim"), *(Text(terminal_text(cell)) for cell in cells))
    return table


def _cell(answer: Answer | None) -> str:
    if answer is None:
        return "(this reference has no model that answers)"
    score = "" if answer.score is None else f"score {answer.score:.3g}, "
    return f"{answer.text}{'' if answer.ended else ' ✂'}\n[{score}reward {answer.reward:+.3f}, {answer.tokens} tokens]"


def samples_markdown(samples: Sequence[Sample]) -> str:
    """Make a Markdown table of samples, for trackers that show text."""

    def cell(value: Any) -> str:
        shown = f"{value:+.3f}" if isinstance(value, float) else str(value or "")
        return markdown(shown)

    table = [COLUMNS, ["---"] * len(COLUMNS), *([cell(value) for value in sample.row()] for sample in samples)]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def append_samples(file: Path, samples: Sequence[Sample]) -> None:
    """Add samples to a file of JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as handle:
        handle.writelines(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)


def keep_until(file: Path, step: int) -> None:
    """Remove what an earlier run wrote after a step, so that a resumed run has each step once; 0 empties it."""
    if not file.is_file():
        return
    lines = file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    kept = [line for line in lines if step and line and (_step_of(line) or step + 1) <= step]
    file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8", errors="surrogateescape")


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # incomplete: the run was stopped while writing it
