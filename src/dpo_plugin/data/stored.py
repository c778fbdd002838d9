"""Prepared pairs on disk: written batch by batch, sealed by a digest at the end, and read only if the seal holds."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from datasets.table import InMemoryTable
from filelock import FileLock

from dpo_plugin.errors import DataError

FEATURES = Features(
    {
        "prompt_ids": ListOf(Value("int32")),
        "chosen_ids": ListOf(Value("int32")),
        "rejected_ids": ListOf(Value("int32")),
        "source": Value("string"),
        "row": Value("int64"),
        "cut": ListOf(Value("int32")),
    }
)

_PAIRS, _AUDIT, _SEAL = "pairs.arrow", "audit.json", "seal"
_LOG = logging.getLogger("axolotl.dpo_plugin.data")  # the host shows loggers under its own name


class StoredPairs:
    """The prepared pairs of one data set in a folder, safe for any number of processes.

    Args:
        folder: The folder; it need not exist.
        key: Digest of everything that the pairs depend on. It is part of the seal, so that pairs moved here from
            another folder are not taken.

    Attributes:
        written: Bytes of ids written so far.
    """

    def __init__(self, folder: Path, key: str):
        self.folder = folder
        self.key = key
        self.written = 0

    def load_or_write(
        self, batches: Callable[[], Iterable[pa.RecordBatch]], audit: Callable[[], dict[str, Any]]
    ) -> tuple[Dataset, dict[str, Any]]:
        """Load the pairs and their audit, writing them first unless they are complete.

        Args:
            batches: Makes the pairs, as record batches of `FEATURES`.
            audit: What became of the rows, once all batches are made; JSON-ready.

        Raises:
            OSError: If they cannot be written.
        """
        if self._is_whole():  # without the lock: who may only read the folder can still use it
            return self._load()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.folder}.lock"):
            if not self._is_whole():
                if self.folder.exists():
                    _LOG.warning(f"dpo_plugin: {self.folder} is not as it was written, so its data is prepared anew")
                self._write(batches, audit)
        return self._load()

    def _load(self) -> tuple[Dataset, dict[str, Any]]:
        table = pa.ipc.open_stream(pa.memory_map(str(self.folder / _PAIRS))).read_all()
        # A table of a file would let datasets keep the indices of shuffles beside that file, under no seal.
        data = Dataset(InMemoryTable(table), fingerprint=self.key[:16])
        return data, json.loads((self.folder / _AUDIT).read_text(encoding="utf-8"))

    def _is_whole(self) -> bool:
        try:
            return (self.folder / _SEAL).read_bytes() == self._seal(self.folder)
        except OSError:
            return False

    def _seal(self, folder: Path) -> bytes:
        digest = hashlib.sha256(self.key.encode())
        for name in (_PAIRS, _AUDIT):
            with (folder / name).open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        return digest.hexdigest().encode()

    def _write(self, batches: Callable[[], Iterable[pa.RecordBatch]], audit: Callable[[], dict[str, Any]]) -> None:
        """Write next to the folder and rename, so that a killed run leaves nothing that looks complete."""
        part = self.folder.with_name(f"{self.folder.name}.part")
        self.written = 0
        try:
            _remove(part)
            part.mkdir()  # not mkdtemp, whose folders other users cannot read
            with (part / _PAIRS).open("wb") as file, pa.ipc.new_stream(file, FEATURES.arrow_schema) as stream:
                for batch in batches():
                    self.written += batch.nbytes
                    stream.write_batch(batch)
            (part / _AUDIT).write_text(json.dumps(audit(), indent=1), encoding="utf-8")
            (part / _SEAL).write_bytes(self._seal(part))
            _remove(self.folder)
            part.replace(self.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cannot_store(folder: Path, error: OSError, wanted: int) -> DataError:
    """The error for a folder of prepared data that cannot be written.

    Args:
        folder: What ``dataset_prepared_path`` says.
        error: What went wrong.
        wanted: Bytes that all pairs take, as far as that is known.
    """
    reason = f"prepared data cannot be kept in `dataset_prepared_path: {folder}`: {error.strerror or error}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" ({error.filename})" if error.filename else ""
        return DataError(f"{reason}{where}. Write: dataset_prepared_path: <a folder that you can write to>")
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    return DataError(
        f"{reason}. About {wanted:,} bytes are wanted, {free:,} are free. Write: dataset_prepared_path: <a folder on a "
        "larger disk>"
    )
