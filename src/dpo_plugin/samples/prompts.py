"""Prompts to answer: read from a file or taken from pairs, and the user's turn in one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_plugin.errors import ConfigError
from dpo_plugin.types import Message

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of a file.

    Attributes:
        content: A text, or messages.
        row: Its line of a file of JSON lines, with all its keys.
    """

    content: str | list[Message]
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """What was asked: the text, or the last message's."""
        return self.content if isinstance(self.content, str) else str(self.content[-1]["content"])

    @property
    def messages(self) -> list[Message]:
        """The prompt as a conversation; a text is one message of the user."""
        return [Message(role="user", content=self.content)] if isinstance(self.content, str) else self.content


def read_prompts(file: str | Path, where: str) -> list[Prompt]:
    """Read a file of prompts: JSON lines with ``prompt`` or ``messages``, or plain text with one prompt per line.

    Args:
        file: The file; it is JSON lines if its name ends in .jsonl or .json, or its first line begins with ``{``.
        where: The key or option that named it, for messages: ``dpo_plugin.samples.prompts`` or ``--prompts``.

    Raises:
        ConfigError: If the file is missing or empty, or a line holds no prompt; names the line.
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
        raise ConfigError(f"{named} is not UTF-8 text: {error}. Write: {key} <a text file>") from error
    # Not splitlines(), which also splits at separators that JSON strings may hold.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ConfigError(f"{named} is empty. Write: {key} <a file with one prompt per line>")
    if path.suffix not in (".jsonl", ".json") and not lines[0][1].startswith("{"):
        return [Prompt(line) for _, line in lines]
    return [_json_prompt(line, f"{named} line {number}") for number, line in lines]


def _json_prompt(line: str, where: str) -> Prompt:
    form = 'Write: {"prompt": "<text>"} or {"messages": [{"role": "user", "content": "<text>"}]}'
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # JSON can say half a character, which no tokenizer takes
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}. {form}") from error
    fields = row if isinstance(row, dict) else {}
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if isinstance(prompt, str) and prompt.strip() and messages is None:
        return Prompt(prompt, fields)
    if not isinstance(messages, list) or not messages or prompt is not None:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ConfigError(
            f"{where} has neither a prompt (text) nor messages alone: it has {found or 'nothing'}. {form}"
        )
    for message in messages:
        whole = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not whole or message.get("role") not in _ROLES:
            said = f"a message without a role ({', '.join(_ROLES)}) and content: {message}"
            raise ConfigError(f"{where} has {said}. {form}")
    if messages[-1]["role"] == "assistant":
        raise ConfigError(
            f"{where} ends with the assistant's answer, which is what is to be generated. Write: messages that end "
            "with the user's"
        )
    return Prompt(messages, fields)


def prompts_of_pairs(rows: Iterable[Mapping[str, Any]], count: int) -> list[list[int]]:
    """Collect the token ids of the first different prompts of prepared pairs."""
    found: dict[tuple[int, ...], None] = {}
    for row in rows:
        if row["prompt_ids"]:
            found.setdefault(tuple(row["prompt_ids"]))
        if len(found) == count:
            break
    return [list(prompt) for prompt in found]


def user_turn(prompt: str, tokenizer: Any) -> str | None:
    """Find the user's last turn in a rendered prompt, by what the tokenizer's chat template writes around such a turn.

    None if there is no template, or the prompt does not end as the template ends one.
    """
    one, other, next_one = "\x00one\x00", "\x00other\x00", "\x00next\x00"
    user, assistant = {"role": "user", "content": one}, {"role": "assistant", "content": other}
    try:
        first = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        later = tokenizer.apply_chat_template([user, assistant, {**user, "content": next_one}], tokenize=False)
        before, after = first.split(one)
        between = later.split(other)[1].split(next_one)[0]
    except Exception:  # a template is someone else's program, and this is only for display
        return None
    opening = os.path.commonprefix([before[::-1], between[::-1]])[::-1]
    if not opening or not after or opening not in prompt or not prompt.endswith(after):
        return None
    return prompt.removesuffix(after).rpartition(opening)[2].strip()
