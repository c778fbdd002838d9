"""Texts that cannot be trained on: found by looking at what goes into a chat template and what comes out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dpo_plugin.data.audit import LOST, NOT_TEXT, SPECIAL
from dpo_plugin.errors import RowError
from dpo_plugin.types import Message, PreferencePair, RenderedPair

_MEDIA = ("image", "images", "image_url", "video", "videos", "video_url", "audio", "audios", "input_audio")
"""Columns, and types of a message's parts, that hold no text."""

_THINKING = re.compile("</?think>")


def refuse_special_tokens(pair: PreferencePair, control_token: re.Pattern[str]) -> None:
    """Refuse a row that brings the text of a control token, in a message or in what else reaches the template.

    Raises:
        RowError: Naming where and which.
    """
    given: list[tuple[str, Any]] = [
        (f"the {message['role']}'s text", [value for key, value in message.items() if key != "role"])
        for message in (*pair.prompt, *pair.chosen, *pair.rejected)
    ]
    for name, value in (*given, ("`tools`", pair.tools), ("`chat_template_kwargs`", pair.template_kwargs)):
        if found := control_token.search("\0".join(_strings(value))):
            raise RowError(f"{name} contains the special token {found[0]!r}", SPECIAL)


def refuse_media(row: Mapping[str, Any], content: str) -> None:
    """Refuse a row with images, video or sound, in a column of its own or as a part of a message.

    Args:
        row: The row as it was read.
        content: The key of a message's content; ShareGPT's ``value`` is known, too.

    Raises:
        RowError: Naming where.
    """
    for name, value in row.items():
        if name in _MEDIA and _holds(value):
            raise RowError(f"`{name}` holds what is not text", NOT_TEXT)
        for message in value if isinstance(value, list) else [value]:
            parts = message.get(content, message.get("value")) if isinstance(message, Mapping) else None
            kinds = [part.get("type") for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []
            if found := next((kind for kind in kinds if kind in _MEDIA), None):
                raise RowError(f"`{name}` has a message with a part of type {found}", NOT_TEXT)


def _holds(value: Any) -> bool:
    """Whether a column holds anything; tables write nothing as a null, or as a list or mapping of nulls."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return any(map(_holds, value)) if isinstance(value, list) else value not in (None, False, "")


def refuse_loss(text: str, given: Iterable[str], template: str) -> None:
    """Refuse a rendered text in which something is missing that was given; a template may trim it.

    Raises:
        RowError: Naming the template and the first text that is missing.
    """
    for wanted in map(str.strip, given):
        if wanted not in text:
            raise RowError(f"{template} leaves out or cuts {wanted[:60]!r}", LOST)


def said_before(messages: Sequence[Message], tools: Sequence[Any] | None) -> Iterator[str]:
    """What a prompt must show: messages, without their thinking, which templates leave out of earlier turns; tools."""
    for message in messages:
        yield _THINKING.split(message["content"])[-1]
        yield from _names(message.get("tool_calls"))
    yield from _names(tools)


def answered(messages: Sequence[Message]) -> Iterator[str]:
    """What a completion must show: its messages, and of the last one also the thinking."""
    yield from said_before(messages, None)
    yield from _THINKING.split(messages[-1]["content"])[:-1]
    yield messages[-1].get("reasoning_content") or ""


def refuse_half_characters(pair: RenderedPair) -> None:
    """Refuse what no UTF-8 text can hold: JSON allows one half of a surrogate pair, tokenizers and files do not.

    Raises:
        RowError: Naming where and which.
    """
    for name in ("prompt", "chosen", "rejected", "source"):
        try:
            getattr(pair, name).encode()
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            raise RowError(f"the {name} holds half a character, the lone surrogate U+{half:04X}") from error


def _names(tools: Sequence[Any] | None) -> Iterator[str]:
    """The names in tool definitions or tool calls."""
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            yield function["name"]


def _strings(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings, keys included; other values as Python writes them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
    else:
        yield str(value)
