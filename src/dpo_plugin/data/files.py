"""Readers of single files: rows in file order, as they come, with nothing kept in memory and nothing altered."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from dpo_plugin.errors import DataError, RowError

Row = Mapping[str, Any]

_BATCH = 1000  # rows of a table that are Python objects at a time
_CHUNK = 1 << 20  # characters of a JSON array, or bytes of a column, that are read at a time
_BOM = b"\xef\xbb\xbf"


# ── JSON ──


def _json_rows(file: Path) -> Iterator[Row | RowError]:
    return _array_rows(file) if _is_array(file) else map(_json_row, _json_lines(file))


def _json_count(file: Path) -> int:
    return sum(1 for _ in (_array_rows(file) if _is_array(file) else _json_lines(file)))


def _is_array(file: Path) -> bool:
    with file.open("rb") as handle:
        return handle.read(_CHUNK).removeprefix(_BOM).lstrip()[:1] == b"["


def _json_lines(file: Path) -> Iterator[bytes]:
    """The lines that are not blank, without line break and byte order mark."""
    with file.open("rb") as handle:
        for number, line in enumerate(handle):
            if line.strip():
                yield (line if number else line.removeprefix(_BOM)).removesuffix(b"\n")


def _json_row(line: bytes) -> Row | RowError:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(f"the line is not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return RowError(f"the line is not JSON: {error}")
    return row if isinstance(row, dict) else RowError(f"the line is {type(row).__name__}, not an object")


def _array_rows(file: Path) -> Iterator[Row | RowError]:
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as handle:
            for number, row in enumerate(_array_items(handle.read), start=1):  # noqa: B007
                wrong = f"the item is {type(row).__name__}, not an object"
                yield row if isinstance(row, dict | RowError) else RowError(wrong)
    except ValueError as error:
        raise DataError(
            f"{file} is neither JSON lines nor a JSON array: after item {number}: {error}. Write one object per line."
        ) from error


_BEGIN = re.compile(r"[ \t\n\r]*\[[ \t\n\r]*(])?")
_NEXT = re.compile(r"[ \t\n\r]*(?:,[ \t\n\r]*|(]))")
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def _array_items(read: Callable[[int], str]) -> Iterator[Any]:
    """The items of a JSON array; one that Python cannot hold (too deep, too long a number) is a `RowError`.

    Args:
        read: Reads up to that many more characters; an empty text is the end.

    Raises:
        ValueError: If the text is not a JSON array.
    """
    text, at, separator = read(_CHUNK), 0, _BEGIN
    while True:
        try:
            if (found := separator.match(text, at)) is None:
                raise ValueError(f"found {text[at : at + 20]!r} instead of , or ]")
            if found[1]:
                break
            item, end = _decode(text, found.end())
            if end == len(text):
                raise ValueError("it is incomplete")  # also a number that may go on
        except ValueError:
            more = read(max(_CHUNK, len(text) - at))
            if not more:
                raise
            text, at = text[at:] + more, 0
            continue
        yield item
        at, separator = end, _NEXT
    if (text[found.end() :] + read(-1)).strip():
        raise ValueError("more text follows")


def _decode(text: str, start: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        depth = 0
        for found in _BRACKETS.finditer(text, start):
            depth += (found[0] in "[{") - (found[0] in "]}")
            if depth == 0:
                return RowError(f"the item is not JSON: {error}"), found.end()
        raise ValueError("it is incomplete") from error


# ── CSV ──


def _csv_rows(file: Path) -> Iterator[Row | RowError]:
    """Every column as text; a quote that is never closed stops, since no one can say which rows it swallowed."""
    csv.field_size_limit(2**31 - 1)  # from 131,072 characters, which an answer may well have
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        lines = csv.reader(handle, strict=True)
        header: list[str] | None = None
        while True:
            begun = lines.line_num + 1
            try:
                fields = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                if header is None or "unexpected end" in str(error):
                    raise DataError(
                        f"{file} cannot be read as csv from line {begun} on: {error}. Write a quote inside of a "
                        'quoted field twice: ""'
                    ) from error
                yield RowError(f"the line is not CSV: {error}")
                continue
            if header is None:
                header = fields
            elif fields:
                yield _csv_row(header, fields)


def _csv_row(header: list[str], fields: list[str]) -> Row | RowError:
    if len(fields) > len(header):
        return RowError(f"the line has {len(fields)} fields, the header {len(header)}")
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return RowError("the line is not UTF-8")
    return dict(zip(header, fields, strict=False))


# ── tables ──


def _parquet_rows(file: Path) -> Iterator[Row | RowError]:
    # By default pyarrow reads row groups ahead and keeps every one until the file is closed.
    with _readable(file, "parquet"), pq.ParquetFile(file, pre_buffer=False, buffer_size=_CHUNK) as table:
        for batch in table.iter_batches(_BATCH):
            yield from _table_rows(batch)


def _parquet_count(file: Path) -> int:
    with _readable(file, "parquet"):
        return int(pq.read_metadata(file).num_rows)


def _arrow_rows(file: Path) -> Iterator[Row | RowError]:
    for batch in _arrow_batches(file):
        for start in range(0, batch.num_rows, _BATCH):
            yield from _table_rows(batch.slice(start, _BATCH))


def _arrow_batches(file: Path) -> Iterator[pa.RecordBatch]:
    with _readable(file, "arrow"), pa.OSFile(str(file)) as handle:
        try:
            batches = iter(pa.ipc.open_stream(handle))
        except pa.ArrowInvalid:  # the other of arrow's two layouts
            whole = pa.ipc.open_file(handle)
            batches = map(whole.get_batch, range(whole.num_record_batches))
        for batch in batches:
            batch.validate(full=True)  # a damaged offset would be read from anywhere in memory
            yield batch


@contextmanager
def _readable(file: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # arrow raises errors of many kinds
        raise DataError(f"{file} cannot be read as {kind}: {error}. Write: path: <a whole file>") from error


def _table_rows(batch: pa.RecordBatch) -> Iterator[Row | RowError]:
    written_by_datasets = b"huggingface" in (batch.schema.metadata or {})
    features = Features.from_arrow_schema(batch.schema) if written_by_datasets else None
    for row in _python_rows(batch):
        if isinstance(row, RowError):
            yield row
        else:
            yield without_nulls(features.decode_example(row) if features else row)


def _python_rows(batch: pa.RecordBatch) -> list[Any]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [RowError(f"the row is not UTF-8: {error.reason} at byte {error.start}")]
        return [row for at in range(batch.num_rows) for row in _python_rows(batch.slice(at, 1))]


def without_nulls(value: Any) -> Any:
    """A row of a table as JSON has it: a table's columns and structs give every row every key, null if it had none."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


READERS: Mapping[str, tuple[Callable[[Path], Iterator[Row | RowError]], Callable[[Path], int]]] = {
    "json": (_json_rows, _json_count),
    "csv": (_csv_rows, lambda file: sum(1 for _ in _csv_rows(file))),
    "parquet": (_parquet_rows, _parquet_count),
    "arrow": (_arrow_rows, lambda file: sum(batch.num_rows for batch in _arrow_batches(file))),
}
"""Kind of file → its reader, and how many rows that gives."""
