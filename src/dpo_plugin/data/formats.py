"""Preference formats: pure functions from one data row to a `PreferencePair` (or text that is already rendered).

Nothing is repaired by guessing: a row that does not say clearly what it means raises `RowError` with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from dpo_plugin.config import ColumnsConfig
from dpo_plugin.data.audit import EMPTY, IDENTICAL
from dpo_plugin.data.files import Row
from dpo_plugin.errors import RowError
from dpo_plugin.types import Message, PreferencePair, RenderedPair

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

_EXTRAS = ("reasoning_content", "tool_calls", "tool_call_id", "name")


class Columns(ColumnsConfig):
    """What the columns of a data set are called, and ``roles``: role names found in the data → the template's roles."""

    roles: Mapping[str, str] = ROLES


PreferenceFormat = Callable[[Row, Columns], PreferencePair | RenderedPair]
"""Reads a row; raises `RowError` where a column is missing, of another type, or empty, and for what it says itself."""


def conversations(row: Row, columns: Columns) -> PreferencePair:
    """Two whole conversations: mlabonne/orpo-dpo-mix-40k, argilla/dpo-mix-7k, argilla's other DPO sets.

    The shared history is the longest common prefix of their messages; what follows is each one's completion.

    Raises:
        RowError: If the conversations share no user turn, are equal, or do not end with the assistant.
    """
    chosen = _messages(row, columns.chosen, columns)
    rejected = _messages(row, columns.rejected, columns)
    shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    if shared in (len(chosen), len(rejected)):
        raise RowError("chosen and rejected are equal, or one is the beginning of the other", IDENTICAL)
    if not any(message["role"] == "user" for message in chosen[:shared]):
        raise RowError("chosen and rejected share no user turn")
    return _pair(row, columns, chosen[:shared], chosen[shared:], rejected[shared:])


def ultrafeedback(row: Row, columns: Columns) -> PreferencePair:
    """HuggingFaceH4/ultrafeedback_binarized: two conversations that open with the text in ``prompt``.

    Raises:
        RowError: As `conversations`, or if the conversations do not open with ``prompt``.
    """
    pair = conversations(row, columns)
    first = next(message["content"] for message in pair.prompt if message["role"] == "user")
    if columns.prompt in row and row[columns.prompt] != first:
        raise RowError(f"`{columns.prompt}` is not what the user says first in `{columns.chosen}`")
    return pair


def prompt_answers(row: Row, columns: Columns) -> PreferencePair:
    """``prompt`` (text or messages) and two answers, with an optional ``system``: jondurbin/truthy-dpo-v0.1.

    An answer is text, one message, or the messages that follow the prompt.
    """
    return _answered(row, columns, columns.prompt)


def messages_answers(row: Row, columns: Columns) -> PreferencePair:
    """``messages`` (the history) and two answers, as axolotl's ``chat_template.default`` reads them."""
    return _answered(row, columns, columns.messages)


def question_answers(row: Row, columns: Columns) -> PreferencePair:
    """``system``, ``question`` and two answers: Intel/orca_dpo_pairs."""
    return _answered(row, columns, columns.question)


_TURN = re.compile(r"\n\n(Human|Assistant):")


def hh_rlhf(row: Row, columns: Columns) -> PreferencePair:
    r"""Two transcripts ``\n\nHuman: … \n\nAssistant: …``: Anthropic/hh-rlhf.

    Raises:
        RowError: If a column is not a transcript, or as `conversations`.
    """
    both = {column: _transcript(row, column, columns) for column in (columns.chosen, columns.rejected)}
    return conversations({**row, **both}, columns)


def _transcript(row: Row, column: str, columns: Columns) -> list[dict[str, str]]:
    text = row.get(column)
    if not isinstance(text, str) or not _TURN.match(text):
        raise RowError(rf"`{column}` does not begin with '\n\nHuman:'")
    parts = _TURN.split(text)[1:]
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{columns.role: who.lower(), columns.content: said.removeprefix(" ")} for who, said in turns]


def rendered_text(row: Row, columns: Columns) -> RenderedPair:
    """``prompt``, ``chosen`` and ``rejected`` as the text that the model shall see, templates and all.

    The end-of-sequence token is added to an answer that ends with no special token, and the tokenizer's
    beginning-of-sequence token to a prompt without it, as TRL does.
    """
    prompt, chosen, rejected = (_text(row, column) for column in (columns.prompt, columns.chosen, columns.rejected))
    if chosen == rejected:
        raise RowError("chosen and rejected are equal", IDENTICAL)
    return RenderedPair(prompt, chosen, rejected, _source(row, columns))


def chat(row: Row, columns: Columns) -> PreferencePair | RenderedPair:
    """Any of the conversational shapes, recognised by its columns."""
    return FORMATS[recognise(row, columns)](row, columns)


def recognise(row: Row, columns: Columns) -> str:
    """The name of the format that a row's columns fit.

    Raises:
        RowError: If they fit none.
    """
    chosen, rejected = row.get(columns.chosen), row.get(columns.rejected)
    for column, value in ((columns.chosen, chosen), (columns.rejected, rejected)):
        if not value:
            raise RowError(f"`{column}` is {_found(value)}")
    if _is_conversation(chosen, columns) and _is_conversation(rejected, columns):
        return "conversations"
    if isinstance(chosen, str) and isinstance(rejected, str) and _TURN.match(chosen):
        return "hh_rlhf"
    for name, column in (("messages", columns.messages), ("prompt", columns.prompt), ("question", columns.question)):
        if row.get(column):
            return name
    wanted = ", ".join(f"`{name}`" for name in (columns.messages, columns.prompt, columns.question))
    raise RowError(f"`{columns.chosen}` is {type(chosen).__name__}, and none of {wanted} says what it answers")


def _is_conversation(value: Any, columns: Columns) -> bool:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value or not isinstance(value[0], Mapping):
        return False
    return columns.roles.get(str(_role(value[0], columns))) in ("system", "user")


def _pair(
    row: Row, columns: Columns, prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]
) -> PreferencePair:
    for column, messages in ((columns.chosen, chosen), (columns.rejected, rejected)):
        if messages[-1]["role"] != "assistant":
            raise RowError(f"`{column}` ends with the {messages[-1]['role']}, not with the assistant")
        if not messages[-1]["content"].strip() and not messages[-1].get("tool_calls"):
            raise RowError(f"`{column}` ends with an empty answer", EMPTY)
    if chosen == rejected:
        raise RowError("chosen and rejected are equal", IDENTICAL)
    kwargs = _parsed(row.get(columns.template_kwargs), columns.template_kwargs, Mapping) or {}
    tools = _parsed(row.get(columns.tools), columns.tools, Sequence)
    given = {key: value for key, value in kwargs.items() if value is not None}
    return PreferencePair(prompt, chosen, rejected, _source(row, columns), tools or None, given)


def _answered(row: Row, columns: Columns, history: str) -> PreferencePair:
    answers = (_answer(row, column, columns) for column in (columns.chosen, columns.rejected))
    return _pair(row, columns, _history(row, history, columns), *answers)


def _history(row: Row, column: str, columns: Columns) -> list[Message]:
    value = row.get(column)
    if value == "":
        raise RowError(f"`{column}` is empty")
    history = [Message(role="user", content=value)] if isinstance(value, str) else _messages(row, column, columns)
    system = row.get(columns.system)
    if system:
        if not isinstance(system, str):
            raise RowError(f"`{columns.system}` is {type(system).__name__}, not text")
        if history[0]["role"] == "system":
            raise RowError(f"`{columns.system}` and `{column}` both bring a system message")
        history.insert(0, Message(role="system", content=system))
    if history[-1]["role"] == "assistant":
        raise RowError(f"`{column}` ends with the assistant, so there is nothing to answer")
    return history


def _answer(row: Row, column: str, columns: Columns) -> list[Message]:
    value = row.get(column)
    if isinstance(value, str):
        return [Message(role="assistant", content=value)]
    if isinstance(value, Mapping):
        return [_message(value, column, columns)]
    answer = _messages(row, column, columns)
    if answer[0]["role"] not in ("assistant", "tool"):
        raise RowError(f"`{column}` begins with the {answer[0]['role']}, not with what follows the prompt")
    return answer


def _text(row: Row, column: str) -> str:
    text = row.get(column)
    if not isinstance(text, str) or not text:
        raise RowError(f"`{column}` is {_found(text)}, not text")
    return text


def _messages(row: Row, column: str, columns: Columns) -> list[Message]:
    raw = row.get(column)
    if isinstance(raw, str) or not isinstance(raw, Sequence) or not raw:
        raise RowError(f"`{column}` is {_found(raw)}, not a list of messages")
    return [_message(item, column, columns) for item in raw]


def _message(item: Any, column: str, columns: Columns) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(f"`{column}` holds {type(item).__name__}, not a message")
    role, content = _role(item, columns), item.get(columns.content, item.get("value"))
    if not isinstance(role, str) or role not in columns.roles:
        raise RowError(f"`{column}` has the unknown role {role!r}; known: {', '.join(columns.roles)}")
    extras = {key: item[key] for key in _EXTRAS if item.get(key) is not None}
    if "tool_calls" in extras:
        extras["tool_calls"] = _parsed(extras["tool_calls"], "tool_calls", Sequence)
        content = content if content is not None else ""
    if not isinstance(content, str):
        raise RowError(f"`{column}` has a message whose {columns.content} is {_found(content)}, not text")
    message: dict[str, Any] = {"role": columns.roles[role], "content": content, **extras}
    return message  # type: ignore[return-value]


def _role(item: Mapping[str, Any], columns: Columns) -> Any:
    return item.get(columns.role, item.get("from"))


def _parsed(value: Any, column: str, kind: type) -> Any:
    """A list or mapping, or the JSON text of one, as data sets store them for lack of a column type."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"`{column}` is text that is not valid JSON: {error}") from error
    if value and (isinstance(value, str) or not isinstance(value, kind)):
        raise RowError(f"`{column}` is {type(value).__name__}, not a {kind.__name__.lower()}")
    return value


def _source(row: Row, columns: Columns) -> str:
    return str(row.get(columns.source) or "")


def _found(value: Any) -> str:
    if value is None:
        return "missing"
    return "empty" if isinstance(value, str | Sequence) and not value else type(value).__name__


FORMATS: Mapping[str, PreferenceFormat] = {
    "chat": chat,
    "conversations": conversations,
    "ultrafeedback": ultrafeedback,
    "prompt": prompt_answers,
    "messages": messages_answers,
    "question": question_answers,
    "hh_rlhf": hh_rlhf,
    "text": rendered_text,
}
