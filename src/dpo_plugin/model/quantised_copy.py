"""A base model in 4 bits on disk: quantised once, weight by weight, and mapped by every rank of every later run.

It is a checkpoint of transformers and bitsandbytes, under the names that the model's parameters have, so that reading
it converts nothing: a weight stays in the file's own pages until an engine takes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from dpo_plugin.errors import ConfigError
from dpo_plugin.model.cache import weights_digest
from dpo_plugin.model.quantising import Writer, quantising_into

MANIFEST = "manifest.json"
"""Written last: what the copy was made of, and the digests of its files."""


def weight_files(base: str, revision: str | None = None) -> list[Path]:
    """Find the safetensors files of a base model and its config.json, in a folder or in the hub's cache.

    Returns:
        Nothing if the weights are not safetensors.
    """
    index = _file(base, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is None:
        names = [SAFE_WEIGHTS_NAME]
    else:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = [_file(base, name, revision) for name in ("config.json", *names)]
    return [file for file in found if file is not None] if None not in found else []


def _file(base: str, name: str, revision: str | None) -> Path | None:
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(str(cached_file(base, name, revision=revision)))
    except OSError:
        return None


def identity(files: list[Path], **facts: Any) -> dict[str, Any]:
    """Say what a copy is made of: files by size and time, so that one that was written again counts as another."""
    stats = [(file.name, file.stat()) for file in files]
    return {"files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats], **facts}


def folder_of(root: Path, base: str, made_of: Mapping[str, Any]) -> Path:
    """The folder of a copy: one for each `identity`."""
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()
    return root / f"{Path(base).name}-{digest[:16]}"


def is_there(folder: Path) -> bool:
    """Whether a copy is complete; `damage` looks at its bytes."""
    return (folder / MANIFEST).is_file()


def manifest_of(folder: Path) -> dict[str, Any]:
    """What `write` has noted: ``made_of``, ``files`` with their bytes and SHA-256, and the base's `weights_digest`."""
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return found


def digest_of(folder: Path) -> str:
    """SHA-256 of the names, sizes and digests of a copy's files."""
    return hashlib.sha256(json.dumps(manifest_of(folder)["files"], sort_keys=True).encode()).hexdigest()


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Find a file of a copy that is not as it was written.

    Args:
        folder: Of the copy.
        part: Which of the files to read; their sizes are compared in any case.
        parts: Among how many processes they are divided.

    Returns:
        What is wrong, or None.
    """
    try:
        files = manifest_of(folder)["files"]
        for number, (name, (size, digest)) in enumerate(sorted(files.items())):
            if (folder / name).stat().st_size != size:
                return f"{name} has another size"
            if number % parts == part and _digest(folder / name) != digest:
                return f"{name} has other bytes"
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def discard(folder: Path) -> None:
    """Remove a copy, out of the way first, so that nobody maps half of one."""
    away = folder.with_name(f"{folder.name}.discarded-{uuid.uuid4().hex}")
    with suppress(OSError):
        folder.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def write(folder: Path, load: Callable[[], Any], made_of: Mapping[str, Any], size: int) -> None:
    """Quantise a base model into a folder, which is there when all of it is; another run may be first.

    Args:
        folder: `folder_of` it.
        load: Loads the base in 4 bits with transformers; what it returns has no weights.
        made_of: Its `identity`, with ``base``, its folder or name.
        size: Bytes that the copy will take.

    Raises:
        ConfigError: If the disk is full or refuses files, or the checkpoint lacks weights of the model.
    """
    guard = partial(_writing, folder, size)
    with guard():
        part = _new_part(folder, size)
    try:
        writer = Writer(part, guard)
        model = _load_into(writer, load)
        with guard():
            _finish(writer, model, made_of)
            _put(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _new_part(folder: Path, size: int) -> Path:
    """Make the folder that a copy is written into, beside its own."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    free = shutil.disk_usage(folder.parent).free
    if free < size:
        raise OSError(f"{free / 2**30:.1f} GiB are free")
    part = folder.with_name(f"{folder.name}.partial-{socket.gethostname()}-{os.getpid()}")
    part.mkdir()
    return part


def _put(part: Path, folder: Path) -> None:
    """Give a whole copy its name, unless another run was first."""
    try:
        part.rename(folder)
    except OSError:
        if not is_there(folder):
            discard(folder)
            part.rename(folder)


def _load_into(writer: Writer, load: Callable[[], Any]) -> Any:
    """Load the base, of which each weight goes to the writer, and return the model that is left."""
    with quantising_into(writer):
        try:
            model = load()
        finally:
            if writer.failure:  # transformers collects what conversions raise, and says something else
                raise writer.failure
    if missing := sorted(name for name, weight in model.named_parameters() if not hasattr(weight, "is_written")):
        raise ConfigError(
            f"the checkpoint of the base model lacks {len(missing)} of its weights, the first is {missing[0]}, so "
            "there is nothing to keep a copy of. Write: dpo_plugin: {loading: host}"
        )
    return model


def _finish(writer: Writer, model: Any, made_of: Mapping[str, Any]) -> None:
    """Write what is beside the weights, the manifest last."""
    writer.flush()
    part = writer.folder
    model.config.save_pretrained(part)
    if model.can_generate():
        model.generation_config.save_pretrained(part)
    total = sum((part / name).stat().st_size for name in set(writer.index.values()))
    index = {"metadata": {"total_size": total}, "weight_map": writer.index}
    (part / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    files = {file.name: [file.stat().st_size, _digest(file)] for file in sorted(part.iterdir())}
    base = Path(str(made_of["base"]))
    noted = {"made_of": made_of, "files": files, "weights": weights_digest(base) if base.is_dir() else None}
    (part / MANIFEST).write_text(json.dumps(noted, default=str), encoding="utf-8")


def _remove_leftovers(folder: Path) -> None:
    """Remove what a process of this host that was killed has left."""
    here = f"{folder.name}.partial-{socket.gethostname()}-"
    for left in folder.parent.glob(f"{here}*"):
        process = left.name.removeprefix(here)
        if not process.isdigit() or not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _writing(folder: Path, size: int) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{folder.parent} cannot take the base model's copy in 4 bits, {size / 2**30:.1f} GiB: "
            f"{' '.join(str(error).split())[:200]}. Make room, or write: dataset_prepared_path: <a folder with room> "
            "(or dpo_plugin: {loading: host})"
        ) from error
