"""Preference formats: pure functions from one data row to a `PreferencePair`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_plugin.errors import RowError
from dpo_plugin.types import Message, PreferencePair

ROLES: Mapping[str, str] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True)
class Columns:
    """What the columns and roles of a data set are called.

    Attributes:
        chosen: Column of the preferred conversation.
        rejected: Column of the other one.
        source: Column that says where a row comes from; may be absent.
        role: Key of a message's role.
        content: Key of a message's text.
        roles: Role names found in the data → the template's roles.
    """

    chosen: str = "chosen"
    rejected: str = "rejected"
    source: str = "source"
    role: str = "role"
    content: str = "content"
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)


PreferenceFormat = Callable[[Mapping[str, Any], Columns], PreferencePair]


def conversations(row: Mapping[str, Any], columns: Columns) -> PreferencePair:
    """Two whole conversations, as in mlabonne/orpo-dpo-mix-40k and argilla's sets.

    The shared history is the longest common prefix of their messages; what follows is each one's completion.

    Raises:
        RowError: If a column is missing or no message list, the conversations share no user turn, are equal,
            or do not end with the assistant.
    """
    chosen = _messages(row, columns.chosen, columns)
    rejected = _messages(row, columns.rejected, columns)
    shared = _common_prefix(chosen, rejected)
    if shared in (len(chosen), len(rejected)):
        raise RowError("chosen and rejected are equal, or one is the beginning of the other")
    prompt = chosen[:shared]
    if not any(message["role"] == "user" for message in prompt):
        raise RowError("chosen and rejected share no user turn")
    for name, messages in ((columns.chosen, chosen), (columns.rejected, rejected)):
        if messages[-1]["role"] != "assistant":
            raise RowError(f"`{name}` ends with the {messages[-1]['role']}, not with the assistant")
    return PreferencePair(prompt, chosen[shared:], rejected[shared:], source=_source(row, columns))


def _messages(row: Mapping[str, Any], column: str, columns: Columns) -> list[Message]:
    raw = row.get(column)
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        found = "missing or empty" if not raw else type(raw).__name__
        raise RowError(f"`{column}` is {found}, not a list of messages")
    return [_message(item, column, columns) for item in raw]


def _message(item: Any, column: str, columns: Columns) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(
            f"`{column}` holds {type(item).__name__}, not a message with {columns.role} and {columns.content}"
        )
    role, content = item.get(columns.role), item.get(columns.content)
    if not isinstance(role, str) or role not in columns.roles:
        raise RowError(f"`{column}` has the unknown role {role!r}; known: {', '.join(columns.roles)}")
    if not isinstance(content, str):
        raise RowError(f"`{column}` has a message whose {columns.content} is {type(content).__name__}, not text")
    return Message(role=columns.roles[role], content=content)


def _common_prefix(first: Sequence[Message], second: Sequence[Message]) -> int:
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length


def _source(row: Mapping[str, Any], columns: Columns) -> str:
    return str(row.get(columns.source) or "")


FORMATS: Mapping[str, PreferenceFormat] = {"chat": conversations}
