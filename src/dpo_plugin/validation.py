"""Types of YAML values, and pydantic's errors as one message that ends with the line to write."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError
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


def _not_true(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


def _with_exponent(value: Any) -> Any:
    """YAML 1.1 reads ``1e-5``, which has no point, as text."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else value


def _folder(path: str) -> str:
    """Refuse a path that cannot become a folder because a file is in its place."""
    folder = Path(path).expanduser()
    try:
        there = next(one for one in (folder, *folder.parents) if one.exists())
    except (OSError, RuntimeError, StopIteration) as error:
        raise ValueError("should be a folder that can be reached") from error
    if not there.is_dir():
        raise ValueError("should be a folder, and a file is there")
    return path


Text = Annotated[str, Strict(), AfterValidator(_not_blank)]
"""A name or path."""

Folder = Annotated[Text, AfterValidator(_folder)]
"""A folder, which need not exist yet."""

Number = Annotated[float, BeforeValidator(_with_exponent)]
"""A number that may be written with an exponent."""

Integer = Annotated[int, BeforeValidator(_not_true)]
Count = Annotated[Integer, Field(ge=1)]
Real = Annotated[float, BeforeValidator(_not_true)]
Unset = BeforeValidator(lambda value: None if value == "" else value)
"""An empty text, which the host takes for a key that is not there."""
Name = Annotated[Text | None, Unset]
AutoInteger = Literal["auto"] | Integer | None
AutoReal = Literal["auto"] | Real | None


class HostKeys(BaseModel):
    """Keys of another program's config: others stay as they are, and ``examples`` are the lines that errors propose."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


@dataclass
class _Place:
    """Where in a model an error is: the path of keys, the last field on it, and the model of that field's value."""

    model: type[BaseModel] | None
    path: list[str] = dataclasses.field(default_factory=list)
    name: str = ""
    field: FieldInfo | None = None


_UNKNOWN = ("extra_forbidden", "invalid_key")


def message(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a config: key, what it should be, what was found, and the line to write.

    Args:
        error: What validating against `model` raised.
        model: The model; its fields have ``examples`` where the default is not a line to write.
    """
    placed = [(_place(model, one), one) for one in error.errors(include_url=False, include_context=False)]
    place, problem = max(placed, key=lambda one: len(one[0].path))  # of a union, the member that was meant
    key = ".".join(map(_short, place.path))
    if problem["type"] in _UNKNOWN:
        return _unknown(key, place)
    reasons = [_reason(one) for there, one in placed if there.path == place.path]
    reasons[1:] = [reason.removeprefix("should be ") for reason in reasons[1:]]
    found = "nothing" if problem["type"] == "missing" else _short(repr(problem["input"]))
    assert place.field is not None
    line = _line(place.name, place.field)
    return f"`{key}` {' or '.join(dict.fromkeys(reasons))} (found {found}). Write: {line}"


def _place(model: type[BaseModel], problem: Any) -> _Place:
    place = _Place(model)
    for part in problem["loc"]:
        if isinstance(part, int) and place.field is not None and _holds(place.field.annotation, list):
            place.path[-1] += f"[{part}]"
        elif place.model is not None and part in place.model.model_fields:
            place.path.append(str(part))
            place.name, place.field = str(part), place.model.model_fields[str(part)]
            place.model = _model_in(place.field.annotation)
        elif place.model is not None and problem["type"] in _UNKNOWN:
            place.path.append(str(part))
        elif place.model is not None and part == place.model.__name__:  # a member of a union, as pydantic names it
            continue
        elif part != "[key]" and place.field is not None and _holds(place.field.annotation, dict):
            place.path.append(str(part))
        else:  # another member
            break
    return place


def _holds(annotation: Any, container: type) -> bool:
    return get_origin(annotation) is container or any(_holds(kind, container) for kind in get_args(annotation))


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
