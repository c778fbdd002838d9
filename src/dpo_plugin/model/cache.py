"""A store of reference log-probs on disk, keyed by content, for any number of processes at once.

Each process appends records to a file of its own; all files of a store are read at the start. A record is the row's
key, two log-probs and a checksum, so a torn or damaged one is recognised, skipped, and computed anew.
"""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_RECORD = struct.Struct("<32sff")  # key, chosen and rejected log-prob in nats
_CHECKED = struct.Struct("<32sffI")

_SAMPLE, _SAMPLES = 1 << 16, 64  # bytes; 64 blocks tell two fine-tunes of one model apart without reading 145 GB


def store_key(**parts: Any) -> str:
    """SHA-256 of everything beside the row that reference log-probs depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(folder: Path) -> str:
    """Digest of a model folder: config, and sizes and sampled blocks of every weight file."""
    digest = hashlib.sha256()
    files = sorted(file for pattern in ("config.json", "*.safetensors", "*.bin") for file in folder.glob(pattern))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as handle:
            if size <= _SAMPLE * _SAMPLES:
                digest.update(handle.read())
                continue
            for index in range(_SAMPLES):
                handle.seek(index * (size - _SAMPLE) // (_SAMPLES - 1))
                digest.update(handle.read(_SAMPLE))
    return digest.hexdigest()


class ReferenceLogpStore:
    """Reference log-probs by row key, in memory and, where possible, on disk.

    Args:
        folder: Where stores are kept; None keeps the values in memory alone.
        key: What `store_key` returned; one sub-folder each.

    Attributes:
        failure: Why nothing more is written to disk, or None.
        damaged: Records on disk that failed their checksum.
    """

    def __init__(self, folder: Path | None, key: str):
        self.folder = folder / key[:32] if folder else None
        self.failure: str | None = None
        self.damaged = 0
        self._values: dict[bytes, tuple[float, float]] = {}
        self._unwritten: list[bytes] = []
        self._file: Path | None = None
        if self.folder is not None:
            self._read(self.folder)
            self._file = self.folder / f"{uuid.uuid4().hex}.logps"

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: bytes) -> bool:
        return key in self._values

    def _read(self, folder: Path) -> None:
        for file in sorted(folder.glob("*.logps")):
            content = file.read_bytes()
            whole = len(content) - len(content) % _CHECKED.size
            self.damaged += len(content) != whole
            for key, chosen, rejected, check in _CHECKED.iter_unpack(content[:whole]):
                if zlib.crc32(_RECORD.pack(key, chosen, rejected)) == check:
                    self._values[key] = (chosen, rejected)
                else:
                    self.damaged += 1

    def reload(self) -> None:
        """Read again what other processes have written meanwhile."""
        if self.folder is not None:
            self._read(self.folder)

    def get(self, keys: Sequence[bytes], device: Any = None) -> Tensor | None:
        """(pairs, 2) fp32 nats of these rows, or None if any is missing."""
        if any(key not in self._values for key in keys):
            return None
        return torch.tensor([self._values[key] for key in keys], dtype=torch.float32, device=device)

    def put(self, keys: Sequence[bytes], logps: Tensor) -> None:
        """Add (pairs, 2) log-probs; they reach the disk with the next `flush`."""
        for key, (chosen, rejected) in zip(keys, logps.tolist(), strict=True):
            if key not in self._values:
                self._values[key] = (chosen, rejected)
                self._unwritten.append(key)

    def flush(self) -> None:
        """Append what is new to this process's file; on a full or read-only disk, go on and keep the reason."""
        if self._file is None or self.failure is not None or not self._unwritten:
            return
        records = b"".join(self._packed(key) for key in self._unwritten)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab") as handle:
                handle.write(records)
        except OSError as error:
            self.failure = f"{self._file.parent}: {error.strerror or error}"
        self._unwritten.clear()

    def _packed(self, key: bytes) -> bytes:
        chosen, rejected = self._values[key]
        return _CHECKED.pack(key, chosen, rejected, zlib.crc32(_RECORD.pack(key, chosen, rejected)))
