"""Whether a flat row gives what two rows per pair give: compared on the run's own model and pairs, not listed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from dpo_plugin.compute.attention import PairSegments, recorded_calls
from dpo_plugin.compute.batching import sequences, shared_segments
from dpo_plugin.compute.step_zero import Deviation
from dpo_plugin.types import CompletionLogps, PairBatch

PAIRS = 2
"""The fewest that show whether pairs of one row see each other."""

LEAST = 4
"""Tokens that prefix and both rests of a pair should have."""

APART = 0.1
"""Share of the norm of what the head reads that rounding cannot explain, however small the logits made of it.

On the tests' random models rounding in bf16 makes up to 0.02; pairs that see each other, or a hidden prefix, 0.15 or
more.
"""

LENGTH = 64
"""Tokens that are enough of a pair without windows; they make the comparison cost less than a step."""

FIRST = 100
"""Pairs of the data to choose short ones from."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a flat row and two rows per pair have in common.

    Attributes:
        logps: The largest difference of a completion's log-probability.
        hidden: Difference of the rows that the head reads, as a share of their norm; 0 where it reads others.
        masks: How the layers' masks differ, or None if a token sees the same tokens in both.
    """

    logps: Deviation
    hidden: float
    masks: str | None

    @property
    def why_not(self) -> str | None:
        """Why rows must not be flat, or None."""
        if self.masks:
            return self.masks
        apart = not self.logps.explained or not self.hidden <= APART
        return f"in a flat row log-probs differ by {self}" if apart else None

    def __str__(self) -> str:
        nats, tokens, allowed = self.logps
        hidden = f"; what the head reads differs by {self.hidden:.1%}" if self.hidden > APART else ""
        return f"{nats:.2g} nats over {tokens} tokens (rounding explains {allowed:.2g}){hidden}"


def rounding(dtype: torch.dtype) -> float:
    """Bound by how much two forwards of one model may differ in batches of other shapes: nats per √token.

    Eight times the spacing of the numbers that the run multiplies (`EngineSettings.dtype`). 16-bit training and
    serving of one model differ by a Kullback-Leibler divergence of about 8e-4 nats a token in bf16 (arXiv 2510.26788),
    which is 0.04 in this unit.
    """
    return max(8 * torch.finfo(dtype).eps, 1e-3)


def pairs_to_compare(rows: Iterable[Any], window: int | None) -> list[Any]:
    """Choose short pairs that have something to share, one of them longer than a window if there is such a pair.

    Args:
        rows: Pairs as token ids; all of them are read only to look for one longer than the window.
        window: The fewest tokens that a layer of the model lets a token see; None if it sees all.

    Returns:
        `PAIRS` of them, or as many as there are, cut to `LENGTH` tokens or as many beyond the window.
    """
    first = sorted(islice(rows, FIRST), key=lambda row: (min(shared_segments(row)) < LEAST, sum(shared_segments(row))))
    long = list(islice((row for row in rows if window and max(map(len, sequences(row))) > window), 1))
    rest = [row for row in first if row not in long][: PAIRS - len(long)]
    return [_cut(row, LENGTH + (window or 0)) for row in long] + [_cut(row, LENGTH) for row in rest]


def _cut(row: Any, length: int) -> dict[str, Any]:
    """Take the end of a prompt and the beginnings of its answers, ``length`` tokens at most."""
    answer = max(length // 2, length - len(row["prompt_ids"]))
    sides = {side: row[side][:answer] for side in ("chosen_ids", "rejected_ids")}
    return {"prompt_ids": row["prompt_ids"][-(length - max(map(len, sides.values()))) :], **sides}


def smallest_window(config: Any) -> int | None:
    """Count the fewest tokens that a layer of a transformers config lets a token see; None if all see all."""
    text = config.get_text_config()
    windows = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min(filter(None, windows), default=None)


def compare_layouts(
    forward: Callable[[PairBatch], CompletionLogps], head: nn.Module, flat: PairBatch, rows: PairBatch, noise: float
) -> Comparison:
    """Forward the same pairs in both layouts.

    Each layer's mask in two rows, which the model has made, is compared with what a flat row lets a token see, whatever
    the dtype: a window that is off by one moves log-probs less than bf16 rounds them. Everything else that may be wrong
    (pairs that see each other, a prefix hidden from rejected, other positions) moves them more.

    Args:
        forward: Runs the model.
        head: The model's.
        flat: Pairs in one row.
        rows: The same pairs in two rows each.
        noise: Nats per √token that rounding explains.
    """
    with recorded_calls() as masks, _rows_read(head, rows) as wanted:
        expected = forward(rows)
    with recorded_calls() as windows, _rows_read(head, flat) as got:
        found = forward(flat)
    apart = (found.sums - expected.sums).abs().nan_to_num(torch.inf)
    allowed = noise * expected.tokens.clamp(min=1).sqrt()
    worst = int((apart / allowed).argmax())
    largest = Deviation(apart[worst].item(), int(expected.tokens[worst]), allowed[worst].item())
    hidden = ((got[-1] - wanted[-1]).norm() / wanted[-1].norm()).item() if got and wanted else 0.0
    return Comparison(largest, hidden, _differing_masks(flat, masks, windows))


@contextmanager
def _rows_read(head: nn.Module, batch: PairBatch) -> Iterator[list[Tensor]]:
    """Context that keeps the rows a head reads of completions, (tokens, hidden), where it reads those of all tokens."""
    read: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs and inputs[0].shape[:-1] == batch.input_ids.shape:
            read.append(inputs[0].detach().flatten(0, -2)[batch.logit_positions].float())

    handle = head.register_forward_pre_hook(keep)
    try:
        yield read
    finally:
        handle.remove()


def _differing_masks(flat: PairBatch, masks: Sequence[Tensor | None], windows: Sequence[int | None]) -> str | None:
    if not masks or len(masks) != len(windows):
        return f"its attention was called {len(windows)} times for a flat row and {len(masks)} for two rows"
    segments = PairSegments(flat.segments, flat.input_ids.shape[1], flat.input_ids.device)
    layers = {
        (id(mask), window): (layer, mask, window)
        for layer, (mask, window) in enumerate(zip(masks, windows, strict=True))
    }
    for layer, mask, window in layers.values():
        for pair, (prefix, chosen, rejected) in enumerate(flat.segments):
            for row, first, rest in ((pair, 0, prefix + chosen), (flat.num_pairs + pair, prefix, rejected)):
                seen = segments.mask(rest, first + rest, window)
                wrong = int((seen != _visible(mask, row, first, rest, seen.device)).sum())
                if wrong:
                    return f"layer {layer} lets tokens of a flat row see {wrong} others than in two rows"
    return None


def _visible(mask: Tensor | None, row: int, first: int, rest: int, device: torch.device) -> Tensor:
    """Cut a row's tokens from a model's mask, (rest, first + rest) bool; without a mask each sees what is before it."""
    end = first + rest
    if mask is None:
        return torch.ones(rest, end, dtype=torch.bool, device=device).tril(first)
    part = mask[min(row, len(mask) - 1), 0, first:end, :end]
    return part if part.dtype == torch.bool else part >= 0
