"""Seeded damage to folders of prepared pairs: prepared anew, refused by an error of ours, or whole; never other ids.

python -m tests.fuzz.prepared --cases 2000
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_plugin.data.formats import FORMATS
from dpo_plugin.data.prepare import LengthLimit, Preparation, PrepareOptions
from dpo_plugin.data.render import Renderer
from dpo_plugin.data.sources import local_source
from dpo_plugin.errors import DPOPluginError
from tests.support import tiny

Damage = Callable[[random.Random, Path, Path], None]


def _file(draw: random.Random, store: Path) -> Path:
    return draw.choice(sorted(store.iterdir()))


def flip(draw: random.Random, store: Path, other: Path) -> None:
    """Bits of one file."""
    file = _file(draw, store)
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 1, 3, 50))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def truncate(draw: random.Random, store: Path, other: Path) -> None:
    """One file, anywhere."""
    file = _file(draw, store)
    os.truncate(file, draw.randrange(file.stat().st_size))


def zero(draw: random.Random, store: Path, other: Path) -> None:
    """A stretch of one file, as after a power failure."""
    file = _file(draw, store)
    content = file.read_bytes()
    at = draw.randrange(len(content))
    file.write_bytes(content[:at] + bytes(len(content) - at))


def grow(draw: random.Random, store: Path, other: Path) -> None:
    """One file, at its end."""
    with _file(draw, store).open("ab") as handle:
        handle.write(draw.randbytes(draw.randrange(1, 100)))


def delete(draw: random.Random, store: Path, other: Path) -> None:
    """Some files, perhaps all."""
    for file in draw.sample(sorted(store.iterdir()), draw.randrange(1, 4)):
        file.unlink()


def swap(draw: random.Random, store: Path, other: Path) -> None:
    """Files of other pairs, perhaps the whole folder; or two files of the folder."""
    names = sorted(file.name for file in store.iterdir())
    if draw.random() < 0.2:
        first, second = draw.sample(names, 2)
        (store / first).rename(store / "kept")
        (store / second).rename(store / first)
        (store / "kept").rename(store / second)
        return
    for name in draw.sample(names, draw.randrange(1, 4)):
        shutil.copy(other / name, store / name)


def replace(draw: random.Random, store: Path, other: Path) -> None:
    """A file or the folder by something else."""
    path = draw.choice([store, *store.iterdir()])
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    kind = draw.choice(("folder", "file", "dangling", "loop", "link"))
    if kind == "folder":
        path.mkdir()
        (path / "x").write_text("x")
    elif kind == "file":
        path.write_bytes(draw.randbytes(30))
    else:
        path.symlink_to({"dangling": "nowhere", "loop": path.name, "link": other}[kind])


def beside(draw: random.Random, store: Path, other: Path) -> None:
    """What a killed run or another program left beside the folder."""
    for name in (f"{store.name}.part", f"{store.name}.lock"):
        path = store.with_name(name)
        path.unlink(missing_ok=True)
        kind = draw.choice(("folder", "file", "nothing", "dangling"))
        if kind == "folder":
            shutil.copytree(store, path)
        elif kind == "file":
            path.write_bytes(draw.randbytes(30))
        elif kind == "dangling":
            path.symlink_to("nowhere/at/all")
    delete(draw, store, other)


def forbid(draw: random.Random, store: Path, other: Path) -> None:
    """Whatever the rights of folder and files; some are damaged, too."""
    if draw.random() < 0.5:
        flip(draw, store, other)
    for path in [store.parent, *store.parent.iterdir(), *store.iterdir()]:
        if draw.random() < 0.4:
            path.chmod(draw.choice((0o000, 0o111, 0o222, 0o444, 0o555)))
        else:
            path.chmod(0o777)


DAMAGES: list[Damage] = [flip, truncate, zero, grow, delete, swap, replace, beside, forbid]


@dataclass(frozen=True)
class Case:
    """One damaged folder.

    Attributes:
        damage: What is done to it.
        seed: Seed of what is drawn while doing so.
    """

    damage: Damage
    seed: int


def cases(seed: int, count: int) -> Iterator[Case]:
    """So many cases, every damage as often as the others."""
    for number in range(count):
        yield Case(DAMAGES[number % len(DAMAGES)], seed * 1_000_003 + number)


@contextmanager
def another_user() -> Iterator[None]:
    """Whom permissions bind, also where this runs as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


class Campaign:
    """Pairs prepared once, and folders of them to damage.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.chmod(0o755)
        self.made, self.other = (self._preparation(name) for name in "ab")
        self.whole = self._load(folder / "whole")
        self.other.load_or_run(folder / "other")

    def _preparation(self, name: str) -> Preparation:
        rows = [tiny.chat_row(f"Question {n}?", f"{name} {n}", f"not {name} {n}") for n in range(4)]
        source = local_source({"path": str(tiny.write_rows(self.folder / f"{name}.jsonl", rows))})
        assert source is not None
        options = PrepareOptions(LengthLimit(512))
        return Preparation("datasets[0]", source, FORMATS["chat"], Renderer(tiny.tokenizer()), options)

    def _load(self, folder: Path) -> Any:
        data, audit = self.made.load_or_run(folder)
        return data[:], audit

    def check(self, case: Case) -> str:
        """``same``, or the name of an error of ours; fails on other ids, another audit or any other error."""
        folder = self.folder / "damaged"
        shutil.copytree(self.folder / "whole", folder)
        (store,), (other,) = ([p for p in path.iterdir() if p.is_dir()] for path in (folder, self.folder / "other"))
        try:
            case.damage(random.Random(case.seed), store, other)
            if case.damage is not forbid:
                assert self._load(folder) == self.whole, case
            with another_user():
                assert self._load(folder) == self.whole, case
            return "same"
        except DPOPluginError as error:
            return type(error).__name__ if len(str(error)) < 500 else "too long an error"
        finally:
            for path in [folder, *folder.iterdir()]:
                path.chmod(0o755, follow_symlinks=False) if not path.is_symlink() else None
            shutil.rmtree(folder)


def run(seed: int, count: int) -> Counter[str]:
    """How often each damage ended how."""
    folder = Path(tempfile.mkdtemp())
    logging.getLogger("axolotl.dpo_plugin.data").disabled = True  # says of every folder that it is prepared anew
    try:
        campaign = Campaign(folder)
        return Counter(f"{case.damage.__name__} {campaign.check(case)}" for case in cases(seed, count))
    finally:
        logging.getLogger("axolotl.dpo_plugin.data").disabled = False
        shutil.rmtree(folder)


def main() -> None:
    """Run a campaign and print what became of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = run(arguments.seed, arguments.cases)
    print(f"{found.total()} folders: {dict(sorted(found.items()))}")


if __name__ == "__main__":
    main()
