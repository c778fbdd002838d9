"""Prompts that are nearly the same: MinHash and LSH of datasketch find candidates, their texts decide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

SIMILAR = 0.8
"""Share of their pieces that two prompts have in common, from which on they are nearly the same."""

_PIECE = 5  # characters: a changed word of a short question costs few of them, unlike pieces of whole words
_BANDS, _ROWS = 20, 6  # misses a pair at `SIMILAR` with a probability of (1 - 0.8 ** 6) ** 20 = 0.2 %


class PromptText(NamedTuple):
    """A prompt for comparing.

    Attributes:
        setting: System message, tools and the like, which must be equal: often long, and the same in every row.
        asked: The rest, which may differ a little.
    """

    setting: str
    asked: str


def is_installed() -> bool:
    """Whether datasketch, an optional dependency, is there."""
    return find_spec("datasketch") is not None


def pieces(text: str) -> set[str]:
    """The runs of five characters of a text, whatever its case and white space; the text itself if it is shorter."""
    plain = " ".join(text.casefold().split())
    return {plain[start : start + _PIECE] for start in range(max(1, len(plain) - _PIECE + 1))}


def similarity(one: str, two: str) -> float:
    """Jaccard index of two texts' pieces, in [0, 1]."""
    first, second = pieces(one), pieces(two)
    return len(first & second) / len(first | second)


def nearly_same(
    prompts: Iterable[PromptText], others: Sequence[PromptText] = ()
) -> tuple[dict[PromptText, PromptText], dict[PromptText, PromptText]]:
    """Find prompts that are nearly the same as an earlier one, and as one of others.

    A prompt is compared with those that began a group, so that a chain of small changes does not become one group.

    Returns:
        Prompt → the one that its group began with, maybe itself; prompt → the first similar one of `others`, if any.
    """
    among_others, begun = _Index(), _Index()
    for other in dict.fromkeys(others):
        among_others.add(other, among_others.sketch(other))
    groups, found = {}, {}
    for prompt in dict.fromkeys(prompts):
        sketch = begun.sketch(prompt)
        if (similar := among_others.find(prompt, sketch)) is not None:
            found[prompt] = similar
        if (first := begun.find(prompt, sketch)) is None:
            begun.add(prompt, sketch)
        groups[prompt] = first or prompt
    return groups, found


class _Index:
    """Prompts that can be found by a similar one."""

    def __init__(self) -> None:
        from datasketch import MinHashLSH

        self._prompts: list[PromptText] = []
        self._hashes = MinHashLSH(num_perm=_BANDS * _ROWS, params=(_BANDS, _ROWS))

    def sketch(self, prompt: PromptText) -> Any:
        from datasketch import MinHash

        sketch = MinHash(_BANDS * _ROWS)
        sketch.update_batch([piece.encode("utf-8", "surrogatepass") for piece in pieces(prompt.asked)])
        return sketch

    def add(self, prompt: PromptText, sketch: Any) -> None:
        self._hashes.insert(len(self._prompts), sketch)
        self._prompts.append(prompt)

    def find(self, prompt: PromptText, sketch: Any) -> PromptText | None:
        """The first one that is similar, or None."""
        candidates = map(self._prompts.__getitem__, sorted(self._hashes.query(sketch)))
        return next((one for one in candidates if _are_similar(one, prompt)), None)


def _are_similar(one: PromptText, two: PromptText) -> bool:
    return one.setting == two.setting and similarity(one.asked, two.asked) >= SIMILAR
