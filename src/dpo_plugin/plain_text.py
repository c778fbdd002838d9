"""Text of others (data, answers, templates' errors) on its way to a terminal, a log or Markdown."""

from __future__ import annotations

import re

# C0, DEL and C1 (which terminals obey), line and paragraph separators, bidirectional overrides, lone surrogates.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_CONTROL_IN_LINES = re.compile(f"(?![\n\t]){_CONTROL.pattern}")
_MARKDOWN = re.compile(r"[\\`*_<>$|~&]|(?<=\])[(\[]")  # a bracket alone is no link


def one_line(text: str, longest: int | None = None) -> str:
    r"""Text without what a terminal obeys or what ends a line: such characters become escapes (``\x1b``, ``\n``).

    Beyond `longest` characters, if given, it is cut and ends with an ellipsis.
    """
    escaped = _CONTROL.sub(_escape, text if longest is None else text[: longest + 1])
    return escaped if longest is None or len(escaped) <= longest else escaped[: longest - 1] + "…"


def terminal_text(text: str) -> str:
    """Text without what a terminal obeys, but with its line breaks and tabs."""
    return _CONTROL_IN_LINES.sub(_escape, text)


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no markup, HTML, formula or table cell begins in it."""
    return _MARKDOWN.sub(r"\\\g<0>", terminal_text(text)).replace("\n", "<br>")


def _escape(character: re.Match[str]) -> str:
    return ascii(character[0])[1:-1]
