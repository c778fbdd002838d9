"""``axolotl dpo recipes``: the recipes that come with the package, and copies of them with the files that they name."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_plugin.errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "shipped"
"""The folders of a checkout's top: links to them in a checkout, the files themselves in a wheel."""

ENGINES, DATA = ("deepspeed_configs/*.json", "fsdp_configs/*.yaml"), ("recipes/data/*.jsonl",)
"""Files that recipes name, by paths relative to the folder in which axolotl runs."""


@dataclass(frozen=True)
class Recipe:
    """A recipe as it comes with the package.

    Attributes:
        name: What users write; the file is ``recipes/<name>.yaml``.
        what: What its head says under ``# What:``, on one line.
        hardware: The same under ``# Hardware:``.
        files: Paths of the shipped files that it names.
        needs: Its keys that name folders of the user's, with these.
    """

    name: str
    what: str
    hardware: str
    files: list[str]
    needs: dict[str, str]


@dataclass(frozen=True)
class Listing:
    """Every recipe, and the paths of every engine's config, which may be copied alone."""

    recipes: list[Recipe]
    engines: list[str]

    def parts(self) -> list[Any]:
        """For the terminal: of each recipe the first sentence of what its head says."""
        from rich.table import Table

        table = Table(title="dpo_plugin: recipes", show_lines=True)
        table.add_column("name", no_wrap=True)
        table.add_column("what", overflow="fold")
        table.add_column("hardware", overflow="fold")
        for one in self.recipes:
            table.add_row(one.name, _first_sentence(one.what), _first_sentence(one.hardware))
        return [
            table,
            "axolotl dpo recipes NAME shows one; with --copy DIR it is written there, with the files that it names.",
            f"Configs of engines, by the same command: {', '.join(self.engines)}",
        ]


@dataclass(frozen=True)
class Shown:
    """The text of a recipe or an engine's config, as a copy has it."""

    name: str
    text: str

    def parts(self) -> list[Any]:
        """For the terminal."""
        return [self.text.rstrip("\n")]


@dataclass(frozen=True)
class Copied:
    """What a copy wrote.

    Attributes:
        written: Paths of new files.
        unchanged: Paths of files that were there with the same contents.
        needs: The recipe's keys that name folders of the user's which are not there yet, with these.
        command: What to run next; None for an engine's config.
    """

    written: list[str]
    unchanged: list[str]
    needs: dict[str, str]
    command: str | None

    def parts(self) -> list[Any]:
        """For the terminal."""
        return [
            *(f"wrote {path}" for path in self.written),
            *(f"{path} is there already, with the same contents" for path in self.unchanged),
            *(f"put there first: {path} ({key})" for key, path in self.needs.items()),
            *([f"then run: {self.command}"] if self.command else []),
        ]


def recipes(name: str | None, folder: str | None) -> Listing | Shown | Copied:
    """List what is shipped, show one of it, or copy it into a folder.

    Raises:
        ConfigError: If nothing of that name is shipped, there is a folder and no name, or a file cannot be written.
    """
    known, engines = _names(), _files(ENGINES)
    if name is None:
        if folder is not None:
            raise ConfigError(
                f"`--copy {folder}` without the name of a recipe. Known: {', '.join(known)}. "
                f"Write: axolotl dpo recipes {known[0]} --copy {shlex.quote(folder)}"
            )
        return Listing([_read(one) for one in known], engines)
    if name not in (*known, *engines):
        close = (difflib.get_close_matches(name, [*known, *engines], n=1) or known)[0]
        where = "" if folder is None else f" --copy {shlex.quote(folder)}"
        raise ConfigError(
            f"there is no recipe {name!r}. Known: {', '.join([*known, *engines])}. "
            f"Write: axolotl dpo recipes {close}{where}"
        )
    if folder is None:
        return Shown(name, next(iter(_contents(name).values())).decode("utf-8"))
    return _copy(name, Path(folder))


def _names() -> list[str]:
    found = sorted(file.stem for file in SHIPPED.glob("recipes/*.yaml"))
    if not found:  # a checkout whose links became text files, as git writes them on Windows by default
        raise ConfigError(f"{SHIPPED} holds no recipes. Run: pip install --force-reinstall --no-deps dpo-plugin")
    return found


def _files(patterns: Iterable[str]) -> list[str]:
    return sorted(file.relative_to(SHIPPED).as_posix() for pattern in patterns for file in SHIPPED.glob(pattern))


def _text(name: str) -> str:
    """A recipe whose head has its path as a copy has it, in the folder in which axolotl runs."""
    text = (SHIPPED / f"recipes/{name}.yaml").read_text(encoding="utf-8")
    return text.replace(f"recipes/{name}.yaml", f"{name}.yaml")


def _read(name: str) -> Recipe:
    text = _text(name)
    files = [path for path in _files((*ENGINES, *DATA)) if path in text]
    return Recipe(name, _head(text, "What"), _head(text, "Hardware"), files, _needs(text))


def _head(text: str, word: str) -> str:
    """What a recipe's head says under a word, up to the next word or the end of the head."""
    found = re.search(rf"^# {word}:(.*\n(?:#  .*\n)*)", text, re.M)
    return " ".join(line.lstrip("# ").rstrip() for line in found[1].splitlines()) if found else ""


def _needs(text: str) -> dict[str, str]:
    config: Mapping[str, Any] = yaml.safe_load(text)
    reference = (config.get("dpo_plugin") or {}).get("reference") or {}
    named = {
        "base_model": config.get("base_model"),
        "lora_model_dir": config.get("lora_model_dir"),
        "dpo_plugin.reference.adapter_dir": reference.get("adapter_dir"),
    }
    return {key: path for key, path in named.items() if isinstance(path, str) and path.startswith("./")}


def _first_sentence(text: str) -> str:
    return re.split(r"[.;](?:\s|$)", text)[0]


def _contents(name: str) -> dict[str, bytes]:
    """Path in the copy → bytes: first what was asked for, then what it names."""
    if name not in _names():
        return {name: (SHIPPED / name).read_bytes()}
    named = {path: (SHIPPED / path).read_bytes() for path in _read(name).files}
    return {f"{name}.yaml": _text(name).encode("utf-8"), **named}


def _copy(name: str, folder: Path) -> Copied:
    """Write what a recipe needs into a folder: all of it, or nothing where a file of another content is in the way."""
    contents = _contents(name)
    written: list[str] = []
    unchanged: list[str] = []
    try:
        for path, content in contents.items():
            file = folder / path
            if file.exists() and (not file.is_file() or file.read_bytes() != content):
                raise ConfigError(
                    f"{file} exists with other contents, and nothing was written. Move it away, or "
                    f"write: axolotl dpo recipes {name} --copy <an empty folder>"
                )
            (unchanged if file.exists() else written).append(path)
        for path in written:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with (folder / path).open("xb") as out:
                out.write(contents[path])
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be written: {error.strerror}. "
            f"Write: axolotl dpo recipes {name} --copy <a folder that you may write to>"
        ) from error
    new, old = ([str(folder / path) for path in paths] for paths in (written, unchanged))
    if name not in _names():
        return Copied(new, old, needs={}, command=None)
    needs = {key: path for key, path in _read(name).needs.items() if not (folder / path).exists()}
    change = "" if folder == Path() else f"cd {shlex.quote(str(folder))} && "
    return Copied(new, old, needs, f"{change}axolotl train {name}.yaml")
