"""Rows from local files and folders, one at a time, with broken lines as countable errors instead of a stop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, Features, ReadInstruction, Value, load_from_disk

from dpo_plugin.data import files as file_readers
from dpo_plugin.data.files import Row, without_nulls
from dpo_plugin.errors import DataError, RowError

_TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}


@dataclass(frozen=True)
class Rows:
    """Rows that are read again on each iteration and never kept in memory.

    Attributes:
        read: Yields each row, or a `RowError` for a line that is not one, in file order.
        count: How many `read` gives.
    """

    read: Callable[[], Iterator[Row | RowError]]
    count: Callable[[], int]

    def __iter__(self) -> Iterator[Row | RowError]:
        try:
            yield from self.read()
        except OSError as error:
            raise DataError(
                f"the data cannot be read any more: {error}. Write: path: <a file on a whole disk>"
            ) from error

    def __len__(self) -> int:
        return self.count()


@dataclass(frozen=True)
class RowSource:
    """Rows that can be read once their content is known to be new.

    Attributes:
        path: What the config calls it.
        digest: SHA-256 over the content (and what selects rows from it).
        read: Gives the rows.
    """

    path: str
    digest: str
    read: Callable[[], Rows]


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
        return RowSource(str(entry["path"]), digest, lambda: _file_rows(str(kind), files, digest, split, path))
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        digest = _digest([str(split), str(entry.get("name"))], inside)
        return RowSource(str(entry["path"]), digest, lambda: dataset_rows(_folder(path, entry, digest)))
    return None


def _digest(words: Sequence[str], files: Sequence[Path]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for file in files:
        try:
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}. Write: path: <a file you can read>") from error
    return digest.hexdigest()


def _file_rows(kind: str, files: Sequence[Path], digest: str, split: Any, path: Path) -> Rows:
    if kind not in file_readers.READERS:
        try:
            return dataset_rows(_loaded(digest, kind, data_files=list(map(str, files)), split=split or "train"))
        except Exception as error:  # the readers raise errors of their own kinds
            raise DataError(f"{path} cannot be read as {kind}: {error}") from error
    read, count = file_readers.READERS[kind]
    rows = Rows(lambda: chain.from_iterable(map(read, files)), lambda: sum(map(count, files)))
    if not split or split == "train":
        return rows
    part = _part(str(split), len(rows), path)
    return Rows(lambda: islice(rows, part.start, part.stop), lambda: len(part))


def _part(split: str, rows: int, path: Path) -> range:
    """The rows that a split such as ``train[:500]`` or ``train[:10%]`` selects."""
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({"train": rows})
    except (ValueError, AssertionError) as error:
        raise DataError(f"{path} is a file, which has the split train only: {error}. Write: split: train") from error
    return range(part.from_, part.to)


def dataset_rows(data: Dataset) -> Rows:
    """The rows of a data set, without the nulls that its columns give to what a row does not have."""
    return Rows(lambda: map(without_nulls, data), lambda: len(data))


def _folder(path: Path, entry: Mapping[str, Any], digest: str) -> Dataset:
    """A folder that `Dataset.save_to_disk` wrote, or that `load_dataset` understands."""
    try:
        try:
            data = load_from_disk(str(path))
        except FileNotFoundError:
            data = _loaded(digest, str(path), name=entry.get("name"))
        for part in data.values() if isinstance(data, DatasetDict) else [data]:
            part.data.validate(full=True)  # a damaged offset would be read from anywhere in memory
    except Exception as error:  # the readers raise errors of their own kinds
        raise DataError(f"the folder {path} holds no data set: {error}") from error
    split = str(entry.get("split") or "train")
    if isinstance(data, Dataset):
        return data.select(_part(split, len(data), path)) if "[" in split else data
    assert isinstance(data, DatasetDict)
    if split not in data:
        raise DataError(f"the folder {path} has no split {split!r}. Write: split: {next(iter(data))}")
    return data[split]


def _loaded(digest: str, path: str, split: str | None = None, **arguments: Any) -> Any:
    """`datasets.load_dataset` with a cache of its own for each content, and CSV as it is written.

    Its cache knows a local file by path and time, so an overwritten file whose time was kept would give the rows that
    it had before (datasets 4.8, data_files.py, `_get_single_origin_metadata`).
    """
    cache = str(Path(datasets.config.HF_DATASETS_CACHE) / "dpo_plugin" / digest[:24])
    load = partial(datasets.load_dataset, path, split=split, cache_dir=cache, **arguments)
    return as_written(load(), load)


def as_written(data: Any, load: Callable[..., Any]) -> Any:
    """A loaded data set, loaded once more with every column as text if it is CSV.

    pandas reads ``0.50`` as 0.5, ``TRUE`` as a boolean and ``NA`` as missing.

    Args:
        data: What was loaded, a `Dataset` or a `DatasetDict`.
        load: Loads it with further arguments of `datasets.load_dataset`.
    """
    part = next(iter(data.values())) if isinstance(data, DatasetDict) else data
    if part.info.builder_name != "csv":
        return data
    text = Features({name: Value("string") for name in part.column_names})
    return load(features=text, keep_default_na=False)
