"""Prompts to answer, and what is shown and kept of the answers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from dpo_plugin.errors import ConfigError
from dpo_plugin.plain_text import markdown, terminal_text
from dpo_plugin.types import Message

_ROLES = ("system", "user", "assistant", "tool")

# ── prompts ──


def read_prompts(file: str | Path, where: str) -> list[str | list[Message]]:
    """The prompts of a file: JSON lines with ``prompt`` or ``messages``, or plain text with one prompt per line.

    Args:
        file: The file; it is JSON lines if its name ends in .jsonl or .json, or its first line begins with ``{``.
        where: The key or option that named it, for messages: ``dpo_plugin.samples.prompts`` or ``--prompts``.

    Raises:
        ConfigError: If the file is missing or empty, or a line is no prompt; names the line.
    """
    path = Path(file).expanduser()
    option = where.startswith("--")
    key = where if option else f"{where.rpartition('.')[2]}:"
    named = f"`{where}{'' if option else ':'} {file}`"
    if not path.is_file():
        raise ConfigError(f"{named} does not exist. Write: {key} <an existing file>")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{named} is no UTF-8 text: {error}. Write: {key} <a text file>") from error
    # Not splitlines(), which also splits at separators that JSON strings may hold.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ConfigError(f"{named} is empty. Write: {key} <a file with one prompt per line>")
    if path.suffix not in (".jsonl", ".json") and not lines[0][1].startswith("{"):
        return [line for _, line in lines]
    return [_json_prompt(line, f"{named} line {number}") for number, line in lines]


def _json_prompt(line: str, where: str) -> str | list[Message]:
    form = 'Write: {"prompt": "<text>"} or {"messages": [{"role": "user", "content": "<text>"}]}'
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # JSON can say half a character, which no tokenizer takes
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}. {form}") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    messages = row.get("messages") if isinstance(row, dict) else None
    if isinstance(prompt, str) and prompt.strip() and messages is None:
        return prompt
    if not isinstance(messages, list) or not messages or prompt is not None:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ConfigError(
            f"{where} has neither a prompt (text) nor messages alone: it has {found or 'nothing'}. {form}"
        )
    checked = [_message(message, where, form) for message in messages]
    if checked[-1]["role"] == "assistant":
        raise ConfigError(
            f"{where} ends with the assistant's answer, which is what is to be generated. Write: messages that end "
            "with the user's"
        )
    return checked


def _message(message: Any, where: str, form: str) -> Message:
    if (
        not isinstance(message, dict)
        or message.get("role") not in _ROLES
        or not isinstance(message.get("content"), str)
    ):
        raise ConfigError(f"{where} has a message that is no role ({', '.join(_ROLES)}) and content: {message}. {form}")
    return cast(Message, message)


def prompts_of_pairs(rows: Iterable[Mapping[str, Any]], count: int) -> list[list[int]]:
    """Token ids of the first different prompts of prepared pairs."""
    found: dict[tuple[int, ...], None] = {}
    for row in rows:
        if row["prompt_ids"]:
            found.setdefault(tuple(row["prompt_ids"]))
        if len(found) == count:
            break
    return [list(prompt) for prompt in found]


# ── samples ──


@dataclass(frozen=True, slots=True)
class Answer:
    """What one of the two answers.

    Attributes:
        text: The answer, without special tokens.
        tokens: Its tokens, the one that ended it included.
        ended: Whether it was ended by the model, before ``max_new_tokens``.
        reward: Its implicit reward β (log π − log π_ref) (Rafailov et al. 2023, section 4).
    """

    text: str
    tokens: int
    ended: bool
    reward: float


@dataclass(frozen=True, slots=True)
class Sample:
    """What policy and reference answer to one prompt.

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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    def row(self) -> list[Any]:
        """Values of `COLUMNS`."""
        other = self.reference
        return [self.prompt, other and other.text, self.policy.text, other and other.reward, self.policy.reward]


COLUMNS = ("prompt", "reference", "policy", "reference_reward", "policy_reward")
"""What trackers show of a sample."""

_SHOWN = 400  # characters of a prompt in the terminal, from its end


def samples_table(samples: Sequence[Sample], title: str) -> Any:
    """A rich table: prompt, the reference's answer and the policy's, each with reward and tokens."""
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
    return f"{answer.text}{'' if answer.ended else ' ✂'}\n[reward {answer.reward:+.3f}, {answer.tokens} tokens]"


def samples_markdown(samples: Sequence[Sample]) -> str:
    """The same as a Markdown table, for trackers that show text."""

    def cell(value: Any) -> str:
        shown = f"{value:+.3f}" if isinstance(value, float) else str(value or "")
        return markdown(shown)

    table = [COLUMNS, ["---"] * len(COLUMNS), *([cell(value) for value in sample.row()] for sample in samples)]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def user_turn(prompt: str, tokenizer: Any) -> str | None:
    """The user's last turn of a rendered prompt, found between what the chat template writes around such a turn.

    Args:
        prompt: The prompt as the model reads it.
        tokenizer: Has the chat template.

    Returns:
        None if there is no template, or the prompt does not end as one of the template.
    """
    one, other, next_one = "\x00one\x00", "\x00other\x00", "\x00next\x00"
    user, assistant = {"role": "user", "content": one}, {"role": "assistant", "content": other}
    try:
        first = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        later = tokenizer.apply_chat_template([user, assistant, {**user, "content": next_one}], tokenize=False)
        before, after = first.split(one)
        between = later.split(other)[1].split(next_one)[0]
    except Exception:  # a template is a program of others, and this is for the eye alone
        return None
    opening = os.path.commonprefix([before[::-1], between[::-1]])[::-1]
    if not opening or not after or opening not in prompt or not prompt.endswith(after):
        return None
    return prompt.removesuffix(after).rpartition(opening)[2].strip()


def append_samples(file: Path, samples: Sequence[Sample]) -> None:
    """Add samples to a file of JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as handle:
        handle.writelines(json.dumps(sample.to_dict(), ensure_ascii=False) + "\n" for sample in samples)


def keep_until(file: Path, step: int) -> None:
    """Leave out what an earlier run wrote after a step, so that a resumed run writes each step once.

    Args:
        file: The file of JSON lines; it may be missing.
        step: Optimizer steps done; 0 empties the file.
    """
    if not file.is_file():
        return
    lines = file.read_text(encoding="utf-8").split("\n")
    kept = [line for line in lines if step and line and (_step_of(line) or step + 1) <= step]
    file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # torn by a stop in the middle of writing
