"""Prompts that are nearly the same; the expected similarities are counted by hand."""

import sys

import pytest

from dpo_plugin.data import near_duplicates
from dpo_plugin.data.near_duplicates import SIMILAR, PromptText, is_installed, nearly_same, pieces, similarity

LONG = "How do I take a coffee stain out of a white cotton shirt without bleach?"


def asked(*texts, setting=""):
    return [PromptText(setting, text) for text in texts]


def test_pieces_are_runs_of_five_characters_whatever_case_and_white_space():
    assert pieces("Ab  cd\ne") == {"ab cd", "b cd ", " cd e"}
    assert pieces("hi") == {"hi"}
    assert pieces("") == {""}


def test_similarity_is_the_share_of_common_pieces():
    """abcdefgh has abcde, bcdef, cdefg, defgh; abcdefgx has abcde, bcdef, cdefg, defgx: 3 of 5."""
    assert similarity("abcdefgh", "abcdefgx") == 3 / 5
    assert similarity("same", "SAME ") == 1


def test_a_small_change_is_found_and_another_question_is_not():
    changed, other = LONG.replace("stain", "stains"), "How do I keep a coffee machine clean without vinegar?"
    assert similarity(LONG, changed) >= SIMILAR > similarity(LONG, other)
    groups, _ = nearly_same(asked(LONG, changed, other))
    assert list(groups.values()) == asked(LONG, LONG, other)


def test_just_below_and_just_at_the_threshold():
    """A text of 40 pieces and one with k more at its end have 40 / (40 + k) in common: 0.8 at k = 10."""
    text = "".join(chr(0x4E00 + n) for n in range(44))  # every piece once
    more = "".join(chr(0x5E00 + n) for n in range(11))
    at, below = text + more[:10], text + more
    assert (similarity(text, at), similarity(text, below)) == (0.8, 40 / 51)
    groups, _ = nearly_same(asked(text, at))
    assert groups[PromptText("", at)].asked == text
    groups, _ = nearly_same(asked(text, below))
    assert groups[PromptText("", below)].asked == below


def test_another_system_message_is_another_prompt():
    prompts = [*asked(LONG, setting="be kind"), *asked(LONG, setting="be brief")]
    groups, found = nearly_same(prompts, asked(LONG, setting="be kind"))
    assert list(groups) == list(groups.values()) == prompts
    assert list(found) == prompts[:1]


def test_a_chain_of_small_changes_is_not_one_group():
    """Each is like the one before (44 of 52 pieces, 0.85), and not like the first but one (40 of 56, 0.71)."""
    text = "".join(chr(0x4E00 + n) for n in range(80))
    chain = [text[start : start + 52] for start in (0, 4, 8)]
    assert similarity(chain[0], chain[1]) == similarity(chain[1], chain[2]) == 44 / 52
    assert similarity(chain[0], chain[2]) == 40 / 56
    groups, _ = nearly_same(asked(*chain))
    assert list(groups.values()) == asked(chain[0], chain[0], chain[2])


def test_among_others_the_first_similar_one_is_named():
    others = asked("Something else entirely, about birds.", LONG + " Please.", LONG + "!")
    _, found = nearly_same(asked(LONG, "Why is the sky blue in the morning?"), others)
    assert found == {PromptText("", LONG): others[1]}


def test_text_that_is_no_unicode_is_compared_all_the_same():
    groups, _ = nearly_same(asked("\ud800 half a character", "\ud800 half a Character"))
    assert len(set(groups.values())) == 1


def test_without_the_library_it_says_so(monkeypatch: pytest.MonkeyPatch):
    assert is_installed()
    monkeypatch.setitem(sys.modules, "datasketch", None)
    assert not is_installed()


def test_the_chance_to_miss_is_what_the_comment_says():
    bands, rows = near_duplicates._BANDS, near_duplicates._ROWS
    assert (1 - SIMILAR**rows) ** bands == pytest.approx(0.002, abs=5e-4)
