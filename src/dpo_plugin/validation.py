"""Types of YAML values, and pydantic's errors as one message that ends with the line to write."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo

LONGEST_NAME = 255
"""Characters of a file's or folder's name beyond which file systems raise instead of saying that it is not there."""

LONGEST_QUOTE = 60
"""Characters of a value or key that a message repeats."""


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("should not be blank")
    if "\0" in text or any(len(part.encode(errors="replace")) > LONGEST_NAME for part in re.split(r"[/\\]", text)):
        raise ValueError(f"should have no part longer than {LONGEST_NAME} bytes and no NUL")
    return text


def _with_exponent(value: Any) -> Any:
    """YAML 1.1 reads ``1e-5``, which has no point, as text."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else value


Text = Annotated[str, AfterValidator(_not_blank)]
"""A name or path."""

Number = Annotated[float, BeforeValidator(_with_exponent)]
"""A number that may be written with an exponent."""


@dataclass
class _Place:
    """Where in a model an error is: the path of keys, the last field on it, and the model of that field's value."""

    model: type[BaseModel] | None
    path: list[str] = dataclasses.field(default_factory=list)
    name: str = ""
    field: FieldInfo | None = None


def message(error: ValidationError, model: type[BaseModel], section: str = "") -> str:
    """The first problem of a config: key, what it should be, what was found, and the line to write.

    Args:
        error: What validating against `model` raised.
        model: The model; its fields have ``examples`` where the default is no line to write.
        section: The key under which the model's fields are, or "" for the top level.
    """
    problems = error.errors(include_url=False, include_context=False)
    place = _place(model, problems[0]["loc"])
    key = ".".join([part for part in [section, *map(_short, place.path)] if part])
    if problems[0]["type"] in ("extra_forbidden", "invalid_key"):
        return _unknown(key, place)
    reasons = [_reason(p) for p in problems if _place(model, p["loc"]).path == place.path]
    reasons[1:] = [reason.removeprefix("should be ") for reason in reasons[1:]]
    found = "nothing" if problems[0]["type"] == "missing" else _short(repr(problems[0]["input"]))
    line = f". Write: {_line(place.name, place.field)}" if place.field else ""
    return f"`{key or 'config'}` {' or '.join(dict.fromkeys(reasons))} (found {found}){line}"


def _place(model: type[BaseModel], loc: Sequence[int | str]) -> _Place:
    place = _Place(model)
    for part in loc:
        if isinstance(part, int) and place.field is not None and _holds(place.field.annotation, list):
            place.path[-1] += f"[{part}]"
        elif place.model is not None:
            place.path.append(str(part))
            if str(part) not in place.model.model_fields:
                break
            place.name, place.field = str(part), place.model.model_fields[str(part)]
            place.model = _model_in(place.field.annotation)
        elif part != "[key]" and place.field is not None and _holds(place.field.annotation, dict):
            place.path.append(str(part))
        else:  # a member of a union, as pydantic names it
            break
    return place


def _holds(annotation: Any, container: type) -> bool:
    return any(get_origin(kind) is container for kind in (annotation, *get_args(annotation)))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _reason(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "missing":
        return "is missing"
    text = re.sub(r"^(Input|String|List|Dictionary|Value error,) ?", "", str(problem["msg"]))
    return re.sub(r" or instance of \w+", "", text).replace("dictionary", "mapping")


def _unknown(key: str, place: _Place) -> str:
    assert place.model is not None
    known = sorted(place.model.model_fields)
    close = (difflib.get_close_matches(place.path[-1], known, n=1) or known)[0]
    return f"unknown key `{key}`. Known: {', '.join(known)}. Write: {_line(close, place.model.model_fields[close])}"


def _line(name: str, field: FieldInfo) -> str:
    """A line that a field takes: its first example, else its default."""
    value = field.examples[0] if field.examples else field.get_default(call_default_factory=True)
    flow = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return f"{name}: {flow.strip().removesuffix('...').strip()}"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}…"
