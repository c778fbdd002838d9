"""A cache of reference log-probs on disk, keyed by content, for any number of processes; and a reference behind it.

Each process appends records to a file of its own; all files of a cache are read at the start. A record is the row's
key, two log-probs and a checksum, so an incomplete or damaged one is recognised, skipped, and computed again.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import uuid
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_plugin.model.references import Forward, ReferenceStrategy
from dpo_plugin.types import PairBatch

_RECORD = struct.Struct("<32sff")  # key, chosen and rejected log-prob in nats
_CHECKED = struct.Struct("<32sffI")

_SAMPLE, _SAMPLES = 1 << 16, 64  # bytes; 64 blocks tell two fine-tunes of one model apart without reading 145 GB

_NEUTRAL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Keys of a model's config that do not change what it computes; precision is a separate part of the cache key."""

CHECKED = 4
"""Batches at the start of a run whose cached log-probs are compared with a forward's."""


def cache_key(**parts: Any) -> str:
    """Hash everything but the row that reference log-probs depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(folder: Path) -> str:
    """Hash a model folder: config, and sizes and sampled blocks of every weight file."""
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


def config_digest(config: Any) -> str:
    """Hash a model's config as loaded: with its overrides, rope scaling and the size of its vocabulary."""
    facts = {name: value for name, value in config.to_dict().items() if name not in _NEUTRAL}
    content = json.dumps(facts, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(content.encode()).hexdigest()


def rope_limit(config: Any) -> int | None:
    """Find the row length in tokens beyond which its batch's rotary frequencies change; None if they never do.

    transformers recomputes them by the longest row of a batch for ``dynamic`` and ``longrope``
    (modeling_rope_utils.py, ``dynamic_rope_update``), so a pair's log-prob depends on its neighbours.
    """
    config = config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    limits = []
    for rope in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        kind = str(rope.get("rope_type"))
        if kind == "longrope" or "dynamic" in kind:
            limits.append(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min(limits, default=None)


def deviation(cached: Tensor, fresh: Tensor, tokens: Tensor) -> float:
    """Measure how far cached log-probs are from those of a forward, in nats per square root of a token.

    Rounding moves a token's log-prob by some σ in either direction, so a sum over n tokens by σ √n, and both figures
    taken here by σ; another model moves every token, or their sum.

    Args:
        cached: (pairs, 2) nats; NaN where none is cached.
        fresh: (pairs, 2) nats; what is not finite is left out, and refused elsewhere.
        tokens: (pairs, 2) number of tokens.
    """
    known = ~torch.isnan(cached) & torch.isfinite(fresh)
    if not known.any():
        return 0.0
    difference, tokens = (fresh - cached)[known].double(), tokens[known].double().clamp(min=1)
    single, together = (difference.square() / tokens).mean().sqrt(), difference.sum().abs() / tokens.sum().sqrt()
    return float(torch.maximum(single, together))


class ReferenceLogpCache:
    """Reference log-probs by row key, in memory and, where possible, on disk; non-finite values are never cached.

    Args:
        folder: Parent of the caches; None keeps the values in memory only.
        key: What `cache_key` returned; one sub-folder each.

    Attributes:
        failure: Why nothing more is written to disk, or None.
        damaged: Unreadable files on disk, and records that are incomplete, fail their checksum or are not finite.
    """

    def __init__(self, folder: Path | None, key: str):
        self.folder = folder / key[:32] if folder else None
        self.failure: str | None = None
        self.damaged = 0
        self._values: dict[bytes, tuple[float, float]] = {}
        self._unwritten: list[bytes] = []
        self._from_disk: set[bytes] = set()
        self._files: set[Path] = set()
        self._outdated: set[Path] = set()
        self._file = self.folder / f"{uuid.uuid4().hex}.logps" if self.folder else None
        self.reload()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: bytes) -> bool:
        return key in self._values

    def reload(self) -> None:
        """Read what other processes have written."""
        for file in sorted(self.folder.glob("*.logps")) if self.folder else ():
            if file == self._file or file in self._outdated:
                continue
            self._files.add(file)
            try:
                content = file.read_bytes()
            except OSError:
                self.damaged += 1
                continue
            whole = len(content) - len(content) % _CHECKED.size
            self.damaged += len(content) != whole
            for key, chosen, rejected, check in _CHECKED.iter_unpack(content[:whole]):
                sound = zlib.crc32(_RECORD.pack(key, chosen, rejected)) == check
                if not sound or not math.isfinite(chosen + rejected):
                    self.damaged += 1
                elif key not in self._values:
                    self._values[key] = (chosen, rejected)
                    self._from_disk.add(key)

    def forget(self) -> None:
        """Drop the records read from disk, and delete their files where permitted."""
        for key in self._from_disk:
            del self._values[key]
        for file in self._files:
            with suppress(OSError):
                file.unlink()
        self._outdated |= self._files
        self._from_disk.clear()
        self._files.clear()

    def get(self, keys: Sequence[bytes], device: Any = None) -> Tensor | None:
        """(pairs, 2) fp32 nats of these rows, or None if any is missing."""
        if any(key not in self._values for key in keys):
            return None
        return torch.tensor([self._values[key] for key in keys], dtype=torch.float32, device=device)

    def read(self, keys: Sequence[bytes]) -> Tensor:
        """(pairs, 2) fp32 nats of these rows as read from disk, NaN for one that was not."""
        missing = (math.nan, math.nan)
        return torch.tensor([self._values[key] if key in self._from_disk else missing for key in keys])

    def put(self, keys: Sequence[bytes], logps: Tensor) -> None:
        """Add (pairs, 2) log-probs; they reach the disk with the next `flush`."""
        for key, (chosen, rejected) in zip(keys, logps.tolist(), strict=True):
            if key not in self._values and math.isfinite(chosen + rejected):
                self._values[key] = (chosen, rejected)
                self._unwritten.append(key)

    def flush(self) -> None:
        """Append new records to this process's file; on a full or read-only disk, continue and keep the reason."""
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


@dataclass(eq=False)
class CachedReference:
    """A reference strategy behind a cache: runs the reference only for rows that are not cached yet.

    The first batches with rows from disk are run anyway: if the cached log-probs are not those of this reference,
    although their key is, all of them are dropped and computed again.

    Attributes:
        cache: The cache, or None.
        on_any_rank: Tells whether a condition holds on any rank, since ranks must forward together.
        tolerance: Most that cached log-probs may be off, as `deviation` measures it.
        warn: Takes a message for the user.
        forwards: Batches for which the reference was run because log-probs were missing.
        fresh: Whether the reference was run for the last batch.
    """

    strategy: ReferenceStrategy
    cache: ReferenceLogpCache | None
    on_any_rank: Callable[[bool], bool]
    tolerance: float = 1e-3
    warn: Callable[[str], None] = warnings.warn
    forwards: int = 0
    fresh: bool = True
    _unchecked: int = CHECKED

    def logps(self, model: Any, batch: PairBatch, forward: Forward, anew: bool = False) -> Tensor:
        """Get log-probs, (pairs, 2) fp32 nats; from the cache if every rank has all of its rows there.

        With ``anew``, equal on all ranks, the reference is run even if all rows are cached.
        """
        if self.cache is None:
            self.forwards += 1
            return self.strategy.logps(model, batch, forward)
        cached = self.cache.get(batch.row_hashes, batch.input_ids.device)
        missing = self.on_any_rank(cached is None)
        read = self.cache.read(batch.row_hashes) if anew or self._unchecked > 0 else None
        check = anew or (read is not None and self.on_any_rank(not read.isnan().all()))
        self.fresh = missing or check
        if cached is not None and not self.fresh:
            return cached
        self.forwards += missing
        logps = self.strategy.logps(model, batch, forward)
        if read is not None and check:
            self._unchecked -= 1
            self._compare(self.cache, read, logps, batch)
        self.cache.put(batch.row_hashes, logps)
        return logps

    def _compare(self, cache: ReferenceLogpCache, read: Tensor, logps: Tensor, batch: PairBatch) -> None:
        tokens = torch.tensor(batch.lengths).reshape(2, -1).T
        if not self.on_any_rank(deviation(read, logps.cpu(), tokens) > self.tolerance):
            return
        cache.forget()
        self.warn(
            f"dpo_plugin: the reference log-probs cached in {cache.folder} are not those of this reference: they are "
            f"off by more than rounding explains ({self.tolerance} nats per square root of a token). The base model's "
            "weights have changed, or a package computes it differently. They are dropped and computed again"
        )
