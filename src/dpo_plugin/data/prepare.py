"""Rows to token ids, once: formatted, rendered, tokenised, cut to length, counted, and stored under their content."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm

from dpo_plugin.data.audit import DUPLICATE, EQUAL_AFTER_CUT, EQUAL_IDS, TOO_LONG, UNKNOWN, Audit, check_usable
from dpo_plugin.data.files import Row
from dpo_plugin.data.formats import Columns, PreferenceFormat, chat, recognise
from dpo_plugin.data.refusals import refuse_media
from dpo_plugin.data.render import PairIds, Renderer
from dpo_plugin.data.sources import RowSource
from dpo_plugin.data.stored import FEATURES, StoredPairs, cannot_store
from dpo_plugin.errors import DataError, RowError
from dpo_plugin.plain_text import one_line
from dpo_plugin.types import RenderedPair

_BATCH = 2000  # rows tokenised at once: enough to keep every core of the tokenizer busy


@dataclass(frozen=True)
class LengthLimit:
    """What to do with pairs that are too long.

    Attributes:
        tokens: Longest prompt + completion in tokens, special tokens counted.
        strategy: drop the pair, truncate it, or raise.
        side: Where truncation begins: ``right`` cuts completions, ``left`` the beginning of the prompt.
    """

    tokens: int
    strategy: Literal["drop", "truncate", "raise"] = "drop"
    side: Literal["left", "right"] = "right"


@dataclass(frozen=True)
class PrepareOptions:
    """Everything besides tokenizer and format that decides what rows become.

    Attributes:
        limit: The length limit.
        columns: Column and role names.
        sample_fraction: Share of the rows that is used, drawn at random.
        seed: Seed of that draw.
        drop_duplicates: Leave out pairs whose ids occurred before.
        max_bad_rows: Share of unusable rows, in [0, 1], above which preparation stops.
    """

    limit: LengthLimit
    columns: Columns = field(default_factory=Columns)
    sample_fraction: float = 1.0
    seed: int = 42
    drop_duplicates: bool = False
    max_bad_rows: float = 0.1


@dataclass(eq=False)
class Preparation:
    """Turns one source of rows into a `Dataset` of ids and an `Audit`.

    Attributes:
        config_key: Where the YAML names the data set, e.g. ``datasets[0]``, for messages.
        source: The rows.
        format: Reads a row.
        renderer: Tokenizer and chat template.
        options: Everything else.
    """

    config_key: str
    source: RowSource
    format: PreferenceFormat
    renderer: Renderer
    options: PrepareOptions

    def key(self) -> str:
        """SHA-256 over everything that the prepared ids depend on, and nothing else."""
        renderer = self.renderer
        unused = {"max_bad_rows", *(["seed"] if self.options.sample_fraction >= 1 else [])}
        options = {key: value for key, value in asdict(self.options).items() if key not in unused}
        parts = {
            "content": self.source.digest,
            "format": getattr(self.format, "__qualname__", repr(self.format)),
            "code": _code_digest(self.format),
            "tokenizer": _tokenizer_digest(renderer.tokenizer),
            "template": [renderer.template, renderer.template_kwargs, renderer.refuse_special_tokens],
            "options": options,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def load_or_run(self, folder: Path) -> tuple[Dataset, dict[str, Any]]:
        """The prepared data from a folder, or made and put there; safe for any number of processes.

        Args:
            folder: Where prepared data is kept, one sub-folder per key.

        Returns:
            The pairs, and the audit as `Audit.to_dict` gives it, with the data set's ``where`` and ``path``.

        Raises:
            DataError: If the folder cannot be written, or too little is left of the data.
        """
        key = self.key()
        stored = StoredPairs(folder / f"dpo_plugin-{key[:24]}", key)
        made = Audit()
        try:
            data, audit = stored.load_or_write(lambda: self.batches(made), made.to_dict)
        except OSError as error:
            rows = len(self.source.read()) * self.options.sample_fraction
            raise cannot_store(folder, error, round(stored.written * rows / max(made.read, 1))) from error
        audit = {"where": self.config_key, "path": self.source.path, **audit}
        check_usable(audit, self.options.limit.tokens, self.options.max_bad_rows)
        return data, audit

    def batches(self, audit: Audit) -> Iterator[pa.RecordBatch]:
        """Prepare and count all rows, `_BATCH` at a time, so that memory does not grow with the data.

        Raises:
            DataError: With ``excess_length_strategy: raise``, for the first pair that is too long.
            TemplateError: If the chat template can split no conversation.
        """
        seen: set[bytes] = set()
        rendered = self._rendered(audit)
        while batch := list(islice(rendered, _BATCH)):
            with patch.dict(os.environ, TOKENIZERS_PARALLELISM="true"):  # axolotl sets false, for later forks' sake
                ids = self.renderer.tokenize([pair for _, pair in batch])
            rows = []
            for (number, pair), pair_ids in zip(batch, ids, strict=True):
                source = one_line(pair.source)
                try:
                    rows.append(self._row(audit, seen, number, source, pair_ids))
                except RowError as error:
                    audit.leave_out(number, source, error.reason, str(error))
            yield pa.RecordBatch.from_pylist(rows, FEATURES.arrow_schema)

    def _rendered(self, audit: Audit) -> Iterator[tuple[int, RenderedPair]]:
        for number, row in self._numbered():
            audit.read += 1
            source = ""
            try:
                if isinstance(row, RowError):
                    raise row
                source = one_line(str(row.get(self.options.columns.source) or ""))
                refuse_media(row, self.options.columns.content)
                shape = recognise(row, self.options.columns) if self.format is chat else self.format.__name__
                pair = self.renderer.render(self.format(row, self.options.columns))
            except (RowError, RecursionError) as error:
                audit.leave_out(number, source, getattr(error, "reason", "malformed"), str(error))
                continue
            audit.shapes[shape] += 1
            if (at_least := self._tokens_at_least(pair)) > self.options.limit.tokens:
                audit.full_lengths.append(at_least)
                audit.leave_out(number, source, TOO_LONG, f"at least {at_least} tokens, not tokenised")
                continue
            yield number, pair

    def _tokens_at_least(self, pair: RenderedPair) -> int:
        """A lower bound that spares tokenising texts of megabytes, which takes minutes; 0 unless they are dropped.

        No token is longer than the vocabulary's longest, and no normaliser makes a text four times shorter.
        """
        if self.options.limit.strategy != "drop":
            return 0
        length = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
        return length // (4 * self.renderer.longest_token)

    def _numbered(self) -> Iterable[tuple[int, Row | RowError]]:
        rows = self.source.read()
        total = len(rows)
        numbered: Iterable[tuple[int, Row | RowError]] = enumerate(rows, start=1)
        if self.options.sample_fraction < 1:
            drawn = random.Random(self.options.seed).sample(
                range(1, total + 1), round(self.options.sample_fraction * total)
            )
            total, chosen = len(drawn), set(drawn)
            numbered = (item for item in numbered if item[0] in chosen)
        return tqdm(numbered, desc=f"Preparing {self.config_key}", total=total, unit="pair", disable=None)

    def _row(self, audit: Audit, seen: set[bytes], number: int, source: str, ids: PairIds) -> dict[str, Any]:
        """Make the row of `FEATURES` that is stored.

        Raises:
            RowError: If the pair cannot be used.
        """
        self._check_ids(ids)
        length, limit = len(ids.prompt) + max(len(ids.chosen), len(ids.rejected)), self.options.limit.tokens
        audit.full_lengths.append(length)
        cut = [0, 0, 0]
        if length > limit:
            ids, cut = self._fit(number, ids, length)
            if ids.chosen == ids.rejected:
                raise RowError(f"{length} tokens cut to {limit}", EQUAL_AFTER_CUT)
            audit.cut[source] += 1
        if self.options.drop_duplicates:
            mark = hashlib.sha256(repr((ids.prompt, ids.chosen, ids.rejected)).encode()).digest()
            if mark in seen:
                raise RowError("the same tokens as an earlier row", DUPLICATE)
            seen.add(mark)
        audit.kept[source] += 1
        audit.lengths.extend((len(ids.prompt), len(ids.chosen), len(ids.rejected)))
        return dict(zip(FEATURES, (ids.prompt, ids.chosen, ids.rejected, source, number, cut), strict=True))

    def _check_ids(self, ids: PairIds) -> None:
        """Refuse a pair of which the tokenizer has lost what the text says, or what tells the two sides apart."""
        if (unknown := self.renderer.unknown_id) is not None:
            lost = sum(side.count(unknown) for side in (ids.prompt, ids.chosen, ids.rejected))
            if lost:
                raise RowError(f"the tokenizer has no token for {lost} piece(s) of the text", UNKNOWN)
        if ids.chosen == ids.rejected:
            raise RowError("chosen and rejected are the same tokens", EQUAL_IDS)

    def _fit(self, number: int, ids: PairIds, length: int) -> tuple[PairIds, list[int]]:
        limit = self.options.limit
        if limit.strategy == "raise":
            raise DataError(
                f"{self.config_key} ({self.source.path}) row {number} has {length} tokens, more than `sequence_len: "
                f"{limit.tokens}`. Write: sequence_len: {length}, or excess_length_strategy: drop"
            )
        truncate, bos = limit.strategy == "truncate", self.renderer.tokenizer.bos_token_id
        fitted = fit(ids, limit, self._end_tokens(ids), bos) if truncate else None
        if fitted is None:
            raise RowError(f"{length} tokens, sequence_len is {limit.tokens}", TOO_LONG)
        return fitted

    def _end_tokens(self, ids: PairIds) -> int:
        """How many ids at the end of both completions are the end of turn: the template's, else the last one."""
        end = self.renderer.end_of_turn_ids
        return len(end) if end and ids.chosen[-len(end) :] == end == ids.rejected[-len(end) :] else 1


def fit(ids: PairIds, limit: LengthLimit, end_tokens: int, bos: int | None = None) -> tuple[PairIds, list[int]] | None:
    """Cut a pair to a length, keeping each completion's end-of-turn tokens.

    Args:
        ids: The pair.
        limit: The limit; its strategy is not looked at.
        end_tokens: How many tokens end a turn.
        bos: Id that stays in front when the prompt is cut from the left.

    Returns:
        The pair and the tokens cut from prompt, chosen and rejected; None if no completion token would be left.
    """
    prompt = ids.prompt
    if limit.side == "left":
        keep = max(limit.tokens - max(len(ids.chosen), len(ids.rejected)), 1)
        if keep < len(prompt):
            front = prompt[:1] if prompt[0] == bos and keep > 1 else []
            prompt = front + prompt[len(prompt) - keep + len(front) :]
    room = limit.tokens - len(prompt)
    if room < end_tokens + 1:
        return None
    chosen, rejected = (_cut_answer(answer, room, end_tokens) for answer in (ids.chosen, ids.rejected))
    cut = [len(ids.prompt) - len(prompt), len(ids.chosen) - len(chosen), len(ids.rejected) - len(rejected)]
    return PairIds(prompt, chosen, rejected), cut


def _cut_answer(answer: list[int], room: int, end_tokens: int) -> list[int]:
    if len(answer) <= room:
        return answer
    return answer[: room - end_tokens] + answer[len(answer) - end_tokens :]


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{content}{tokenizer.special_tokens_map}".encode()).hexdigest()


def _code_digest(read: PreferenceFormat) -> str:
    """Digest of the source of this folder and of the format's module, so that changed code never reads old ids."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    try:
        digest.update(inspect.getsource(sys.modules[read.__module__]).encode())
    except (OSError, TypeError):
        digest.update(repr(read).encode())
    return digest.hexdigest()
