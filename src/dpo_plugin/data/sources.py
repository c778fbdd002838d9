"""Rows from local files and folders, with broken lines as countable errors instead of a stop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, ReadInstruction, load_dataset, load_from_disk

from dpo_plugin.errors import DataError, RowError

Row = Mapping[str, Any]
_TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}


@dataclass(frozen=True)
class RowSource:
    """Rows that can be read once their content is known to be new.

    Attributes:
        path: What the config calls it.
        digest: SHA-256 over the content (and what selects rows from it).
        read: Gives each row, or the `RowError` of a line that is none, in file order.
    """

    path: str
    digest: str
    read: Callable[[], Iterable[Row | RowError]]


def local_source(entry: Mapping[str, Any]) -> RowSource | None:
    """The rows of a dataset entry that names local files or a local folder; None if it names neither.

    Args:
        entry: ``path``, and optionally ``data_files``, ``ds_type``, ``split``, ``name``.

    Raises:
        DataError: If the folder or file cannot be read at all.
    """
    path = Path(str(entry["path"])).expanduser()
    named = entry.get("data_files")
    files = [Path(file) for file in ([named] if isinstance(named, str) else named or [])]
    if files and not all(file.is_file() for file in files):
        return None
    if not files and path.is_file():
        files = [path]
    split = entry.get("split")
    if files:
        kind = entry.get("ds_type") or _TABLES.get(files[0].suffix, "json")
        digest = _digest([str(kind), str(split)], files)
        if kind == "json":
            return RowSource(str(entry["path"]), digest, lambda: _sliced(list(_json_rows(files)), split, path))
        return RowSource(str(entry["path"]), digest, lambda: _table_rows(kind, files, split, path))
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        digest = _digest([str(split), str(entry.get("name"))], inside)
        return RowSource(str(entry["path"]), digest, lambda: _folder_rows(path, entry))
    return None


def _digest(words: Sequence[str], files: Sequence[Path]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for file in files:
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _json_rows(files: Sequence[Path]) -> Iterator[Row | RowError]:
    for file in files:
        content = file.read_bytes()
        if content.lstrip()[:1] == b"[":
            yield from _json_array(file, content)
            continue
        for line in content.split(b"\n"):
            if line.strip():
                yield _json_row(line)


def _json_row(line: bytes) -> Row | RowError:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(f"the line is not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return RowError(f"the line is not JSON: {error}")
    return row if isinstance(row, dict) else RowError(f"the line is {type(row).__name__}, not an object")


def _json_array(file: Path, content: bytes) -> Iterator[Row | RowError]:
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise DataError(
            f"{file} is neither JSON lines nor a JSON array: {error}. Write one object per line."
        ) from error
    for row in rows:
        yield row if isinstance(row, dict) else RowError(f"the item is {type(row).__name__}, not an object")


def _sliced(rows: list[Row | RowError], split: Any, path: Path) -> list[Row | RowError]:
    """The rows that a split such as ``train[:500]`` or ``train[:10%]`` selects."""
    if not split or split == "train":
        return rows
    try:
        (part,) = ReadInstruction.from_spec(str(split)).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError) as error:
        raise DataError(f"{path} is a file, which has the split train only: {error}. Write: split: train") from error
    return rows[part.from_ : part.to]


def _table_rows(kind: str, files: Sequence[Path], split: Any, path: Path) -> Dataset:
    try:
        return load_dataset(kind, data_files=[str(file) for file in files], split=split or "train")
    except Exception as error:  # the readers raise errors of their own kinds
        raise DataError(f"{path} cannot be read as {kind}: {error}") from error


def _folder_rows(path: Path, entry: Mapping[str, Any]) -> Dataset:
    """Rows of a folder that `Dataset.save_to_disk` wrote, or that `load_dataset` understands."""
    try:
        try:
            data = load_from_disk(str(path))
        except FileNotFoundError:
            data = load_dataset(str(path), name=entry.get("name"))
    except Exception as error:  # as above
        raise DataError(f"the folder {path} holds no data set: {error}") from error
    split = str(entry.get("split") or "train")
    if isinstance(data, Dataset):
        return Dataset.from_list(_sliced(list(data), split, path)) if "[" in split else data
    assert isinstance(data, DatasetDict)
    if split not in data:
        raise DataError(f"the folder {path} has no split {split!r}. Write: split: {next(iter(data))}")
    return data[split]
