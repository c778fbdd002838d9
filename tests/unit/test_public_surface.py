"""What a user writes: keys of the YAML, commands and their options, hooks, registered names, names of the package.

`tests/data/public_surface.json` was made from the code as it was before its files moved into one room per word, so that
moving and shrinking them changes nothing that anybody writes. Left out of it:

- descriptions, whose wording is free;
- the defaults of ``data.columns``: they were null, which meant the usual name, as the descriptions said, and are that name
  now; null still means it;
- ``--png`` of ``axolotl dpo report``, the one option that was given up on purpose: each chart of the page is an SVG that a
  browser saves or prints, and nothing read the PNG files.

A key, option, name or signature that is meant to come, go or change is a change of the file, made by
``python -m tests.unit.test_public_surface``, which asks for a line in CHANGELOG.md first.
"""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import click
import pytest

import dpo_plugin
from dpo_plugin import hookspecs
from dpo_plugin.__main__ import dpo
from dpo_plugin.config import DPOPluginConfig
from dpo_plugin.registry import get_registry
from tests.support import tiny

FILE = Path(__file__).parent.parent / "data/public_surface.json"
FREE_WORDING = {"description", "title", "examples"}
GIVEN_UP = {("report", "png")}
EXPORTED = sorted(name for name in dpo_plugin.__all__ if name not in ("__version__", "DPOPlugin", "DPOPluginConfig"))
"""Names that a third party writes in Python; the host calls `DPOPlugin`, and the schema of the config is compared whole."""


def section() -> Any:
    """JSON schema of ``dpo_plugin:`` with every reference put in place, so that the names of our classes do not count."""
    schema = DPOPluginConfig.model_json_schema()
    found = without_wording(schema, schema["$defs"])
    for column in columns_of(found).values():
        del column["default"]
    return found


def columns_of(schema: Any) -> dict[str, Any]:
    return schema["properties"]["data"]["properties"]["columns"]["properties"]


def without_wording(part: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(part, list):
        return [without_wording(one, definitions) for one in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        rest = {key: value for key, value in part.items() if key != "$ref"}
        return without_wording({**definitions[part["$ref"].rpartition("/")[2]], **rest}, definitions)
    return {
        key: {name: without_wording(one, definitions) for name, one in value.items()}
        if key == "properties"
        else without_wording(value, definitions)
        for key, value in part.items()
        if key not in FREE_WORDING | {"$defs"}
    }


def command(name: str, found: click.Command) -> dict[str, Any]:
    facts = [parameter.to_info_dict() for parameter in found.params]
    kept = ("param_type_name", "opts", "type", "required", "nargs", "multiple", "default", "is_flag")
    return {
        str(fact["name"]): {key: fact.get(key) for key in kept}
        for fact in facts
        if (name, fact["name"]) not in GIVEN_UP
    }


def signatures(name: str) -> dict[str, str]:
    """Of a name of the package: of the function, or of the class and its public methods, with types and defaults."""
    thing = getattr(dpo_plugin, name)
    if inspect.isfunction(thing):
        return {name: str(inspect.signature(thing))}
    if not isinstance(thing, type):
        return {name: type(thing).__name__ if " at 0x" in str(thing) else str(thing)}
    fields = {
        key: str(getattr(value, "__forward_arg__", value))
        for one in reversed(thing.__mro__)
        for key, value in vars(one).get("__annotations__", {}).items()
    }
    ours = [one for one in reversed(thing.__mro__) if one.__module__.startswith("dpo_plugin")]
    found = {name: ", ".join(f"{key}: {value}" for key, value in fields.items() if not key.startswith("_"))}
    for key, value in {key: value for one in ours for key, value in vars(one).items()}.items():
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if inspect.isfunction(function) and (not key.startswith("_") or key in ("__init__", "__call__")):
            found[f"{name}.{key}"] = str(inspect.signature(function))
    return found


def surface() -> dict[str, Any]:
    """All of it as JSON has it; names that a third party registered are not ours."""
    registry = get_registry()
    kinds = {kind: getattr(registry, kind) for kind in registry.__dataclass_fields__}
    found = {
        "section": section(),
        "commands": {name: command(name, one) for name, one in dpo.commands.items()},
        "hooks": sorted(name for name in vars(hookspecs) if name.startswith("dpo_")),
        "registered": {
            kind: sorted(name for name in names if names.owner(name) == "builtins") for kind, names in kinds.items()
        },
        "package": sorted(dpo_plugin.__all__),
        "signatures": {key: text for name in EXPORTED for key, text in signatures(name).items()},
    }
    return json.loads(json.dumps(found, sort_keys=True, default=repr))


BEFORE = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}


def test_null_is_the_usual_name_of_a_column_as_when_it_was_the_default():
    columns = columns_of(BEFORE["section"])
    nulls = DPOPluginConfig.model_validate({"data": {"columns": dict.fromkeys(columns)}})
    assert nulls.data.columns.model_dump() == {
        **{name: name for name in columns},
        "template_kwargs": "chat_template_kwargs",
    }


@pytest.mark.parametrize("part", ["section", "commands", "hooks", "registered", "package", "signatures"])
def test_what_users_write_is_what_it_was(part: str):
    assert surface()[part] == BEFORE[part]


def test_every_public_name_of_the_package_is_there():
    assert all(hasattr(dpo_plugin, name) for name in dpo_plugin.__all__)


def unreleased() -> str:
    """Digest of what CHANGELOG.md says of the next version."""
    text = (
        (tiny.ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("## [Unreleased]")[2].partition("\n## ")[0]
    )
    return hashlib.sha256(text.encode()).hexdigest()


def renewed(before: dict[str, Any], now: dict[str, Any], changelog: str) -> dict[str, Any]:
    """The file's new content; `changelog` is the digest of what is said of the next version."""
    if {key: value for key, value in before.items() if key != "changelog"} == now:
        return before
    assert changelog != before.get("changelog"), "the public surface has changed: say so in CHANGELOG.md first"
    return {**now, "changelog": changelog}


def test_the_file_is_renewed_only_with_a_line_in_the_changelog():
    before = {"package": ["a"], "changelog": "1"}
    assert renewed(before, {"package": ["a"]}, "2") == before
    assert renewed(before, {"package": ["a", "b"]}, "2") == {"package": ["a", "b"], "changelog": "2"}
    with pytest.raises(AssertionError, match="CHANGELOG"):
        renewed(before, {"package": ["a", "b"]}, "1")


if __name__ == "__main__":
    found = renewed(BEFORE, surface(), unreleased())
    FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
