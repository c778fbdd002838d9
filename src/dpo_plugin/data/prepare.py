"""Rows to token ids, once: formatted, rendered, tokenised, cut to length, counted, and stored under their content."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable
from tqdm import tqdm

from dpo_plugin.data import files as files_module
from dpo_plugin.data import formats as formats_module
from dpo_plugin.data import refusals as refusals_module
from dpo_plugin.data import render as render_module
from dpo_plugin.data import sources as sources_module
from dpo_plugin.data.audit import DUPLICATE, EQUAL_AFTER_CUT, EQUAL_IDS, LENGTH_REASONS, TOO_LONG, UNKNOWN, Audit
from dpo_plugin.data.files import Row
from dpo_plugin.data.formats import Columns, PreferenceFormat, chat, recognise
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
    """All that decides what rows become, beside tokenizer and format.

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


class Preparation:
    """Turns one source of rows into a `Dataset` of ids and an `Audit`.

    Args:
        where: The config key, e.g. ``datasets[0]``, for messages.
        source: The rows.
        read: The format.
        renderer: Tokenizer and chat template.
        options: Everything else.
    """

    def __init__(
        self, where: str, source: RowSource, read: PreferenceFormat, renderer: Renderer, options: PrepareOptions
    ):
        self.where = where
        self.source = source
        self.read = read
        self.renderer = renderer
        self.options = options

    def key(self) -> str:
        """SHA-256 over everything that the prepared ids depend on, and nothing else."""
        renderer = self.renderer
        unused = {"max_bad_rows", *(["seed"] if self.options.sample_fraction >= 1 else [])}
        options = {key: value for key, value in asdict(self.options).items() if key not in unused}
        parts = {
            "content": self.source.digest,
            "format": [getattr(self.read, "__qualname__", repr(self.read)), _code_of(self.read)],
            "code": _code_of(sources_module, files_module, formats_module, render_module, refusals_module, Preparation),
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
            The pairs, and the audit as `Audit.to_dict` gives it.

        Raises:
            DataError: If the folder cannot be written, or too little is left of the data.
        """
        key = self.key()
        stored = StoredPairs(folder / f"dpo_plugin-{key[:24]}", key)
        made = Audit(self.where, self.source.path)
        try:
            data, audit = stored.load_or_write(lambda: self.batches(made), made.to_dict)
        except OSError as error:
            rows = len(self.source.read()) * self.options.sample_fraction
            raise cannot_store(folder, error, round(stored.written * rows / max(made.read, 1))) from error
        audit |= {"where": self.where, "path": self.source.path}
        self._check(audit)
        return data, audit

    def run(self) -> tuple[Dataset, Audit]:
        """Prepare all rows in memory.

        Raises:
            DataError: With ``excess_length_strategy: raise``, for the first pair that is too long.
            TemplateError: If the chat template can split no conversation.
        """
        audit = Audit(self.where, self.source.path)
        table = pa.Table.from_batches(self.batches(audit), FEATURES.arrow_schema)
        return Dataset(InMemoryTable(table)), audit

    def batches(self, audit: Audit) -> Iterator[pa.RecordBatch]:
        """Prepare all rows, `_BATCH` at a time, so that memory does not grow with the data.

        Args:
            audit: Where each row is counted.

        Raises:
            DataError, TemplateError: As `run`.
        """
        seen: set[bytes] = set()
        rendered = self._rendered(audit)
        while batch := list(islice(rendered, _BATCH)):
            with _every_core():
                ids = self.renderer.tokenize([pair for _, pair in batch])
            columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
            for (number, pair), pair_ids in zip(batch, ids, strict=True):
                self._take(columns, audit, seen, number, one_line(pair.source), pair_ids)
            yield pa.RecordBatch.from_pydict(columns, FEATURES.arrow_schema)

    def _rendered(self, audit: Audit) -> Iterator[tuple[int, RenderedPair]]:
        for number, row in self._numbered():
            audit.read += 1
            source = ""
            try:
                if isinstance(row, RowError):
                    raise row
                source = one_line(str(row.get(self.options.columns.source) or ""))
                shape = recognise(row, self.options.columns) if self.read is chat else self.read.__name__
                pair = self.renderer.render(self.read(row, self.options.columns))
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
        return tqdm(numbered, desc=f"Preparing {self.where}", total=total, unit="pair", disable=None)

    def _take(
        self, columns: dict[str, list[Any]], audit: Audit, seen: set[bytes], number: int, source: str, ids: PairIds
    ) -> None:
        if wrong := self._unusable(ids):
            audit.leave_out(number, source, *wrong)
            return
        length = len(ids.prompt) + max(len(ids.chosen), len(ids.rejected))
        audit.full_lengths.append(length)
        cut = [0, 0, 0]
        if length > self.options.limit.tokens:
            fitted = self._fit(number, ids, length)
            if fitted is None:
                audit.leave_out(
                    number, source, TOO_LONG, f"{length} tokens, sequence_len is {self.options.limit.tokens}"
                )
                return
            ids, cut = fitted
            if ids.chosen == ids.rejected:
                audit.leave_out(number, source, EQUAL_AFTER_CUT, f"{length} tokens cut to {self.options.limit.tokens}")
                return
            audit.cut[source] += 1
        if self.options.drop_duplicates:
            mark = hashlib.sha256(repr((ids.prompt, ids.chosen, ids.rejected)).encode()).digest()
            if mark in seen:
                audit.leave_out(number, source, DUPLICATE, "the same tokens as an earlier row")
                return
            seen.add(mark)
        audit.kept[source] += 1
        audit.lengths.extend((len(ids.prompt), len(ids.chosen), len(ids.rejected)))
        for name, value in zip(FEATURES, (ids.prompt, ids.chosen, ids.rejected, source, number, cut), strict=True):
            columns[name].append(value)

    def _unusable(self, ids: PairIds) -> tuple[str, str] | None:
        """Reason and message if the tokenizer has lost what the text says, or what tells the two sides apart."""
        if (unknown := self.renderer.unknown_id) is not None:
            lost = sum(side.count(unknown) for side in (ids.prompt, ids.chosen, ids.rejected))
            if lost:
                return UNKNOWN, f"the tokenizer has no token for {lost} piece(s) of the text"
        return (EQUAL_IDS, "chosen and rejected are the same tokens") if ids.chosen == ids.rejected else None

    def _fit(self, number: int, ids: PairIds, length: int) -> tuple[PairIds, list[int]] | None:
        limit = self.options.limit
        if limit.strategy == "raise":
            raise DataError(
                f"{self.where} ({self.source.path}) row {number} has {length} tokens, more than `sequence_len: "
                f"{limit.tokens}`. Write: sequence_len: {length}, or excess_length_strategy: drop"
            )
        if limit.strategy == "drop":
            return None
        return fit(ids, limit, self._end_tokens(ids), self.renderer.tokenizer.bos_token_id)

    def _end_tokens(self, ids: PairIds) -> int:
        """How many ids at the end of both completions are the end of turn: the template's, else the last one."""
        end = self.renderer.end_of_turn_ids
        return len(end) if end and ids.chosen[-len(end) :] == end == ids.rejected[-len(end) :] else 1

    def _check(self, audit: Mapping[str, Any]) -> None:
        """Stop if nothing, or too little, is left.

        Raises:
            DataError: Saying what to change.
        """
        out: Mapping[str, int] = audit["left_out"]
        too_long = sum(out.get(reason, 0) for reason in LENGTH_REASONS)
        bad = sum(out.values()) - too_long - out.get(DUPLICATE, 0)
        named = f"`{self.where}` ({self.source.path})"
        first = one_line("; ".join(f"row {row['row']}: {row['message']}" for row in audit["examples"][:3]), 200)
        if not audit["read"]:
            raise DataError(f"{named} is empty. Write: path: <a file with rows>")
        if not audit["kept"] and too_long > bad:
            fits = audit["sequence_len_for_95_percent"]
            raise DataError(
                f"{named}: with `sequence_len: {self.options.limit.tokens}` no completion token survives in any of "
                f"{too_long} pairs. 95 % of the pairs fit in {fits} tokens. Write: sequence_len: {fits}"
            )
        if not audit["kept"]:
            raise DataError(f"{named} has no usable row out of {audit['read']}. {first}")
        share = bad / audit["read"]
        if share > self.options.max_bad_rows:
            raise DataError(
                f"{named}: {bad} of {audit['read']} rows ({share:.0%}) cannot be used, more than "
                f"`dpo_plugin.data.max_bad_rows: {self.options.max_bad_rows}` allows. {first}. "
                f"Mend the data, or write: max_bad_rows: {math.ceil(100 * share) / 100}"
            )


@contextmanager
def _every_core() -> Iterator[None]:
    """Let the tokenizer use every core; axolotl turns that off at import, for the sake of later forks."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{content}{tokenizer.special_tokens_map}".encode()).hexdigest()


def _code_of(*things: Any) -> str:
    """Digest of the source files in which things are defined, so that changed code never reads old ids."""
    digest = hashlib.sha256()
    for thing in things:
        module = thing if inspect.ismodule(thing) else sys.modules[thing.__module__]
        try:
            digest.update(inspect.getsource(module).encode())
        except (OSError, TypeError):
            digest.update(repr(thing).encode())
    return digest.hexdigest()
