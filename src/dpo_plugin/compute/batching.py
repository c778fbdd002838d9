"""From token ids to `PairBatch`."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpo_plugin.types import PairBatch


@dataclass(frozen=True)
class PairCollator:
    """Pads pairs to two rows each, chosen rows first.

    Attributes:
        pad_token_id: Id that fills the right of short rows.
        pad_to_multiple_of: Row length is rounded up to a multiple of this.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows of ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and perhaps ``source``.

        Returns:
            The fields of `PairBatch` as a dict, the form that the host's data loader moves to a device.
        """
        sides = [
            (example["prompt_ids"], example[side]) for side in ("chosen_ids", "rejected_ids") for example in examples
        ]
        length = max(len(prompt) + len(completion) for prompt, completion in sides)
        multiple = self.pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple
        input_ids = torch.full((len(sides), length), self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros((len(sides), length), dtype=torch.long)
        completion_mask = torch.zeros((len(sides), length), dtype=torch.long)
        for row, (prompt, completion) in enumerate(sides):
            end = len(prompt) + len(completion)
            input_ids[row, :end] = torch.tensor([*prompt, *completion])
            attention_mask[row, :end] = 1
            completion_mask[row, len(prompt) : end] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": completion_mask,
            "sources": [str(example.get("source") or "") for example in examples],
            "keys": [row_key(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in examples],
        }


def row_key(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> bytes:
    """SHA-256 of a pair's exact token ids."""
    digest = hashlib.sha256()
    for ids in (prompt, chosen, rejected):
        digest.update(struct.pack(f"<q{len(ids)}i", len(ids), *ids))
    return digest.digest()


def to_pair_batch(collated: Mapping[str, Any]) -> PairBatch:
    """Name the fields of a collated dict."""
    return PairBatch(**{name: collated[name] for name in PairBatch.__dataclass_fields__ if name in collated})
