"""docs/settings.md, made of the schema of ``dpo_plugin:``: ``python -m tests.settings_page`` writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dpo_plugin.config import DPOPluginConfig
from tests.support.tiny import ROOT

PAGE = ROOT / "docs/settings.md"
HEAD = """\
# Settings: every key of `dpo_plugin:`

All are optional, and unknown keys and names are errors that list the known ones. What is not here is axolotl's:
`rl_beta`, `dpo_loss_type`, `sequence_len`, `datasets`, … keep their meaning. All keys are there since 0.1.0. This page is
made of the schema that reads the YAML (`python -m tests.settings_page`).
"""
WORDS = {str: "text", bool: "true or false", int: "whole number", float: "number"}
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}


def page() -> str:
    return "\n".join([HEAD, *(line for part in sections(DPOPluginConfig, "dpo_plugin") for line in part)])


def sections(model: type[BaseModel], name: str) -> Iterator[list[str]]:
    """The table of a section's own keys, then those of the sections in it."""
    own, inner = [], []
    for key, field in model.model_fields.items():
        if (kind := section_of(field.annotation)) is not None:
            inner.append((kind, f"{name}.{key}"))
        else:
            own.append(row(key, field))
    text = model.__doc__ if name != "dpo_plugin" else "Keys that stand in the section itself."
    if own:
        yield [
            f"## `{name}`\n",
            f"{text}\n".replace("``", "`"),
            "| key | type | default | meaning |",
            "|---|---|---|---|",
            *own,
            "",
        ]
    for kind, path in inner:
        yield from sections(kind, path)


def section_of(annotation: Any) -> type[BaseModel] | None:
    found = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next((kind for kind in found if issubclass(kind, BaseModel)), None)


def row(key: str, field: FieldInfo) -> str:
    kind = ", ".join([type_of(field.annotation), *bounds(field.metadata)])
    default = (
        "" if field.is_required() or field.get_default(call_default_factory=True) in (None, {}) else written(field)
    )
    cells = (f"`{key}`", kind, default, str(field.description))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def written(field: FieldInfo) -> str:
    return f"`{json.dumps(field.get_default(call_default_factory=True), ensure_ascii=False)}`".replace('"', "")


def bounds(metadata: list[Any]) -> list[str]:
    return [text.format(getattr(one, name)) for one in metadata for name, text in BOUNDS.items() if hasattr(one, name)]


def type_of(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return ", ".join([type_of(inside[0]), *(one for part in inside[1:] for one in bounds_of(part))])
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in inside)
    if origin in (Union, UnionType):
        return " or ".join(type_of(one) for one in inside if one is not type(None))
    if origin is dict:
        return f"{type_of(inside[0])} → {type_of(inside[1])}"
    if origin is list:
        return f"list of {type_of(inside[0])}"
    return WORDS[annotation]


def bounds_of(part: Any) -> list[str]:
    return bounds(list(part.metadata)) if isinstance(part, FieldInfo) else bounds([part])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
