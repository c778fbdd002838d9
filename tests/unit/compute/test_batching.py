"""Tokens of a forward, packs and names of rows, counted by hand."""

# Eight mutants of batching.py (mutmut) survive, since they change nothing: `strict=` of a `zip` of lengths equal by
# construction.

import pytest
import torch

from dpo_plugin.compute.batching import PairCollator, find_row, row_hash, row_name, shared_segments
from dpo_plugin.errors import DataError
from tests.support.tiny import example

SHORT, LONG = example(3, 4, 6), example(2, 9, 5)
"""In one flat row 3 + 4 + 6 = 13 and 2 + 9 + 5 = 16 tokens; in two rows the longer side has 9 and 11."""


@pytest.mark.parametrize(
    ("flat", "multiple", "of_short", "of_both"),
    [(True, None, 13, 29), (True, 8, 16, 32), (False, None, 18, 44), (False, 8, 32, 64)],
)
def test_tokens_of_a_forward(flat, multiple, of_short, of_both):
    collator = PairCollator(0, multiple, flat)
    assert collator.tokens([SHORT]) == of_short
    assert collator.tokens([SHORT, LONG]) == of_both
    ids = collator([SHORT, LONG])["input_ids"]
    assert ids.numel() == of_both


def test_short_rows_are_filled_on_the_right():
    row = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]}
    batch = PairCollator(9, pad_to_multiple_of=6)([row])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9], [1, 2, 6, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]
    flat = PairCollator(9, pad_to_multiple_of=8, flat=True)([row])
    assert flat["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 9, 9]]
    assert flat["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 0, 0]]


@pytest.mark.parametrize("flat", [True, False])
def test_pairs_keep_their_places_and_sources(flat):
    pairs = [{**SHORT, "source": "books"}, LONG]
    batch = PairCollator(0, flat=flat)(pairs)
    assert (batch["places"], batch["sources"]) == ([0, 1], ["books", ""])
    packs = PairCollator(0, flat=flat, max_tokens=30 - 7 * flat)(pairs)["packs"]
    assert [(pack["places"], pack["sources"]) for pack in packs] == [([1], [""]), ([0], ["books"])]


@pytest.mark.parametrize("flat", [True, False])
def test_answers_of_one_token_without_a_prompt_have_no_labels(flat):
    batch = PairCollator(0, flat=flat)([{"prompt_ids": [], "chosen_ids": [1], "rejected_ids": [2]}])
    assert (batch["labels"].dtype, batch["labels"].shape) == (torch.long, (0,))


@pytest.mark.parametrize(("flat", "of_long", "of_both"), [(True, 16, 29), (False, 22, 44)])
def test_a_limit_may_be_reached(flat, of_long, of_both):
    assert len(PairCollator(0, flat=flat, max_tokens=of_both).packs([SHORT, LONG])) == 1
    assert PairCollator(0, flat=flat, max_tokens=of_both - 1).packs([SHORT, LONG]) == [[LONG], [SHORT]]
    PairCollator(0, flat=flat, max_tokens=of_long).check_fits(LONG)
    says = rf"^a pair takes {of_long} tokens, more than .*Write: max_tokens: {of_long} \(or more\)"
    with pytest.raises(DataError, match=says):
        PairCollator(0, flat=flat, max_tokens=of_long - 1).check_fits(LONG)
    with pytest.raises(DataError, match=rf"^row 7 of source 'books' takes {of_long} tokens"):
        PairCollator(0, flat=flat, max_tokens=of_long - 1).check_fits({**LONG, "source": "books"}, "row 7")
    PairCollator(0, flat=flat).check_fits(LONG)


@pytest.mark.parametrize(
    ("chosen", "rejected", "segments"),
    [([5, 6], [5, 7], (4, 1, 1)), ([5], [5, 7], (3, 1, 2)), ([5, 6], [8, 6], (3, 2, 2)), ([], [7], (2, 1, 2))],
)
def test_no_rest_is_empty(chosen, rejected, segments):
    assert shared_segments({"prompt_ids": [1, 2, 3], "chosen_ids": chosen, "rejected_ids": rejected}) == segments


def test_a_row_is_named_by_its_place_in_its_file_or_in_the_prepared_data():
    def key(row):
        return row_hash(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])

    rows = [SHORT, {**LONG, "row": 0}, example(2, 9, 5, seed=1)]
    assert [find_row(rows, key(row)) for row in rows] == ["prepared row 1", "row 0", "prepared row 3"]
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert find_row(rows, key({**LONG, name: [*LONG[name], 0]})) is None
    assert row_name({"row": None}, 4) == "prepared row 5"
