"""From token ids to `PairBatch`: two padded rows per pair, or one flat row in which a pair's prefix stands once."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from dpo_plugin.errors import DataError
from dpo_plugin.types import PairBatch

Example = Mapping[str, Any]
"""A row of ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and perhaps ``source``."""


@dataclass
class PairCollator:
    """Lays pairs out for a forward.

    Attributes:
        pad_token_id: Id that fills the right of short rows.
        pad_to_multiple_of: Row length is rounded up to a multiple of this.
        flat: One flat row instead of two rows per pair; may be turned off before the first batch.
        max_tokens: Most tokens, padding included, in one forward; more pairs than that are split over several.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    flat: bool = False
    max_tokens: int | None = None

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Collate pairs.

        Returns:
            The fields of `PairBatch` as a dict, the form that the host's data loader moves to a device, and each pair's
            index in ``examples`` as ``places``; with ``max_tokens``, ``{"packs": [one such dict per forward]}``.

        Raises:
            DataError: If a single pair is longer than ``max_tokens``.
        """
        if self.max_tokens is None:
            return self._lay_out(examples)
        examples = [{**example, "place": place} for place, example in enumerate(examples)]
        return {"packs": [self._lay_out(pack) for pack in self.packs(examples)]}

    def _lay_out(self, examples: Sequence[Example]) -> dict[str, Any]:
        batch = flat_row(examples) if self.flat else padded_rows(examples, self.pad_token_id)
        return pad_right(batch, self.pad_token_id, self.pad_to_multiple_of or 1)

    def tokens(self, examples: Sequence[Example]) -> int:
        """Count the tokens, padding included, that one forward of these pairs takes."""
        if self.flat:
            tokens = sum(sum(shared_segments(example)) for example in examples)
        else:
            tokens = max(len(ids) for example in examples for ids in sequences(example))
        multiple = self.pad_to_multiple_of or 1
        return -(-tokens // multiple) * multiple * (1 if self.flat else 2 * len(examples))

    def packs(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Split pairs over as few forwards as first-fit-decreasing finds, each of ``max_tokens`` at most."""
        assert self.max_tokens is not None
        packs: list[list[Example]] = []
        for example in sorted(examples, key=lambda one: self.tokens([one]), reverse=True):
            self.check_fits(example)
            fits = (pack for pack in packs if self.tokens([*pack, example]) <= self.max_tokens)
            pack = next(fits, None)
            if pack is None:
                packs.append([example])
            else:
                pack.append(example)
        return packs

    def check_fits(self, example: Example, name: str = "a pair") -> None:
        """Check that a pair alone is not longer than ``max_tokens``.

        Raises:
            DataError: Naming the pair, its tokens and the line to write.
        """
        if self.max_tokens is not None and (tokens := self.tokens([example])) > self.max_tokens:
            source = f" of source {example['source']!r}" if example.get("source") else ""
            raise DataError(
                f"{name}{source} takes {tokens} tokens, more than `dpo_plugin.compute.max_tokens: {self.max_tokens}`. "
                f"Write: max_tokens: {tokens} (or more), or a smaller sequence_len"
            )


def sequences(example: Example) -> tuple[list[int], list[int]]:
    """Join the ids that the model reads for chosen and for rejected."""
    prompt = list(example["prompt_ids"])
    return prompt + list(example["chosen_ids"]), prompt + list(example["rejected_ids"])


def shared_segments(example: Example) -> tuple[int, int, int]:
    """Count tokens of the longest common prefix, the rest of chosen and the rest of rejected; no rest is empty."""
    chosen, rejected = example["chosen_ids"], example["rejected_ids"]
    prompt = len(example["prompt_ids"])
    most = min(len(chosen), len(rejected)) - 1
    common = next((at for at in range(max(most, 0)) if chosen[at] != rejected[at]), most)
    prefix = prompt + common
    return prefix, prompt + len(chosen) - prefix, prompt + len(rejected) - prefix


def padded_rows(examples: Sequence[Example], pad_token_id: int) -> dict[str, Any]:
    """Lay out the fields of a `PairBatch` in two padded rows per pair."""
    pairs = [*map(sequences, examples)]
    rows = [torch.tensor(pair[side]) for side in (0, 1) for pair in pairs]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    starts = range(0, input_ids.numel(), input_ids.shape[1])
    logit_positions = [
        torch.arange(start + first - 1, start + end - 1)
        for start, (first, end, _) in zip(starts, _completions(examples), strict=True)
    ]
    return {"input_ids": input_ids, "attention_mask": attention_mask, **_fields(examples, logit_positions)}


def flat_row(examples: Sequence[Example]) -> dict[str, Any]:
    """Lay out the fields of a flat `PairBatch`: nothing is read twice and nothing is padded."""
    ids: list[int] = []
    positions, segments, chosen_positions, rejected_positions = [], [], [], []
    for example, (first, end, _) in zip(examples, _completions(examples), strict=False):  # those of chosen alone
        chosen, rejected = sequences(example)
        prefix, *rest = shared_segments(example)
        start = len(ids)
        ids += chosen + rejected[prefix:]
        positions += [torch.arange(len(chosen)), torch.arange(prefix, len(rejected))]
        segments.append((prefix, *rest))
        chosen_positions.append(torch.arange(start + first - 1, start + end - 1))
        place = torch.arange(first - 1, len(rejected) - 1)
        rejected_positions.append(start + torch.where(place < prefix, place, place + len(chosen) - prefix))
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.cat(positions)[None],
        "segments": segments,
        **_fields(examples, chosen_positions + rejected_positions),
    }


def _completions(examples: Sequence[Example]) -> Iterator[tuple[int, int, list[int]]]:
    """Yield where each side's completion begins and ends, and its ids; nothing predicts the first token of a row."""
    for side in ("chosen_ids", "rejected_ids"):
        for example in examples:
            prompt, ids = len(example["prompt_ids"]), example[side]
            first = max(prompt, 1)
            yield first, prompt + len(ids), ids[first - prompt :]


def _fields(examples: Sequence[Example], logit_positions: list[Tensor]) -> dict[str, Any]:
    pairs = len(examples)
    lengths = [len(positions) for positions in logit_positions]
    labels = [token for *_, label in _completions(examples) for token in label]
    shorter = [*map(min, lengths[:pairs], lengths[pairs:])] * 2
    beyond_shorter = [torch.arange(length) >= least for length, least in zip(lengths, shorter, strict=True)]
    return {
        "logit_positions": torch.cat(logit_positions),
        "labels": torch.tensor(labels, dtype=torch.long),
        "lengths": lengths,
        "beyond_shorter": torch.cat(beyond_shorter),
        "num_pairs": pairs,
        "places": [example.get("place", number) for number, example in enumerate(examples)],
        "sources": [str(example.get("source") or "") for example in examples],
        "row_hashes": [row_hash(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in examples],
    }


def pad_right(batch: dict[str, Any], pad_token_id: int, multiple: int) -> dict[str, Any]:
    """Pad the rows to a multiple; padding belongs to no pair."""
    length = batch["input_ids"].shape[1]
    extra = -length % multiple
    if not extra:
        return batch
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "position_ids": 0}
    padded = {name: pad(batch[name], (0, extra), value=value) for name, value in fill.items() if name in batch}
    positions = batch["logit_positions"]
    return {**batch, **padded, "logit_positions": positions // length * (length + extra) + positions % length}


def row_hash(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> bytes:
    """SHA-256 of a pair's exact token ids."""
    digest = hashlib.sha256()
    for ids in (prompt, chosen, rejected):
        digest.update(struct.pack(f"<q{len(ids)}i", len(ids), *ids))
    return digest.digest()


def to_pair_batch(collated: Mapping[str, Any]) -> PairBatch:
    """Make a `PairBatch` of a collated dict."""
    return PairBatch(**{name: collated[name] for name in PairBatch.__dataclass_fields__ if name in collated})


def find_row(rows: Iterable[Example], key: bytes) -> str | None:
    """Name the row with this hash for a message; None if it is not among them."""
    for number, row in enumerate(rows):
        if row_hash(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == key:
            return row_name(row, number)
    return None


def row_name(row: Example, number: int) -> str:
    """``row <number in its file, from 1>`` where the data says so, else by its place in the prepared data."""
    return f"row {row['row']}" if row.get("row") is not None else f"prepared row {number + 1}"
