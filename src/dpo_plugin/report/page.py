"""The report's template engine, and how numbers and texts are written in it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from dpo_plugin.report.charts import to_svg


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {function.__name__: function for function in (number, percent, shown, prose, sentence)}
    environment.filters["svg"] = lambda chart: Markup(to_svg(chart))  # matplotlib escapes what it writes
    return environment


def page(**content: Any) -> str:
    """A whole HTML page that needs no network, from what report.html.jinja names; all is escaped but `Markup`."""
    return _environment().get_template("report.html.jinja").render(content) + "\n"


def prose(text: str) -> Markup:
    """A sentence as HTML; what stands between backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def number(value: Any) -> str:
    """A number in three digits, whole ones with all of theirs; an empty place for None; other values as they are."""
    if not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    if isinstance(value, int) or (math.isfinite(value) and value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}".replace("-", "−")
    text = f"{value:,.0f}" if 999.5 <= abs(value) < 1e15 else f"{value:.3g}"
    return text.replace("-", "−")


def percent(share: Any) -> str:
    """A share in three digits; what is no number as it is."""
    return f"{100 * share:.3g}%" if isinstance(share, (int, float)) else number(share)


def shown(value: Any, name: str) -> str:
    """A value under its name: accuracies as a share of a hundred, other numbers in three digits, text as it is."""
    return percent(value) if "accurac" in name else number(value)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as ``a.b`` → text, for tables and comparisons."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
            found |= flat({str(at): entry for at, entry in enumerate(value)}, f"{prefix}{name}.")
        elif value is not None:
            found[f"{prefix}{name}"] = str(value)
    return found
