"""What is odd about pairs; the pairs are letters, so that the expected answers can be read off them."""

import pytest

from dpo_plugin.data.near_duplicates import PromptText
from dpo_plugin.data.suspects import (
    AuditedPair,
    Margins,
    check_pairs,
    find_contradictions,
    length_gap,
    lowest,
    percentiles,
    suspects,
)
from dpo_plugin.types import PreferencePair, RenderedPair


def pair(row, prompt, chosen, rejected, tokens=(4, 2), where="datasets[0]"):
    return AuditedPair(
        where, row, "made", PromptText("", prompt), chosen.encode(), rejected.encode(), *tokens, prompt[:10]
    )


def pairs_of(*texts):
    """``q A B``: prompt q, chosen A, rejected B."""
    return [pair(row, *text.split()) for row, text in enumerate(texts, start=1)]


class TestWhatIsLookedAt:
    ASK = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?\nReally?"})
    YES, NO = ({"role": "assistant", "content": "Yes"},), ({"role": "assistant", "content": "No"},)

    def of(self, pair):
        return AuditedPair.of(pair, "datasets[0]", 3, "web", (5, 6))

    def test_a_pair_of_messages(self):
        found = self.of(PreferencePair(self.ASK, self.YES, self.NO))
        assert found.prompt.asked == "Why?\nReally?"
        assert "Be kind." in found.prompt.setting
        assert (found.excerpt, found.name, found.source) == ("Why?\\nReally?", "datasets[0] row 3", "web")
        assert (found.chosen_tokens, found.rejected_tokens) == (5, 6)
        assert found.chosen != found.rejected

    def test_a_swapped_pair_has_the_same_answers(self):
        one, two = (
            self.of(PreferencePair(self.ASK, self.YES, self.NO)),
            self.of(PreferencePair(self.ASK, self.NO, self.YES)),
        )
        assert (one.prompt, one.chosen, one.rejected) == (two.prompt, two.rejected, two.chosen)

    @pytest.mark.parametrize(
        "other",
        [
            PreferencePair(ASK[1:], YES, NO),
            PreferencePair(ASK, YES, NO, tools=[{"name": "search"}]),
            PreferencePair(ASK, YES, NO, template_kwargs={"enable_thinking": True}),
            PreferencePair((*ASK, *YES, {"role": "user", "content": "Why?\nReally?"}), YES, NO),
        ],
    )
    def test_what_makes_another_prompt(self, other):
        assert self.of(other).prompt != self.of(PreferencePair(self.ASK, self.YES, self.NO)).prompt

    def test_rendered_text(self):
        found = self.of(RenderedPair("Q: why", "yes", "no"))
        assert (found.prompt, found.excerpt) == (PromptText("", "Q: why"), "Q: why")
        assert found.chosen != found.rejected


class TestContradictions:
    def test_a_swapped_pair_names_the_other(self):
        assert find_contradictions(pairs_of("q A B", "q B A", "q A C")) == ({0: 1, 1: 0}, 1)

    def test_a_ranking_of_three_is_none(self):
        """A over B over C: B is on both sides, in two pairs."""
        assert find_contradictions(pairs_of("q A B", "q B C", "q A C")) == ({}, 2)

    def test_a_circle_of_three_is_one_of_all_its_pairs(self):
        """A over B over C over A; D over A only leads into it."""
        found, _ = find_contradictions(pairs_of("q A B", "q B C", "q C A", "q D A"))
        assert found == {0: None, 1: None, 2: None}

    def test_a_pair_between_two_circles_is_none(self):
        found, _ = find_contradictions(pairs_of("q A B", "q B A", "q C D", "q D C", "q A C"))
        assert set(found) == {0, 1, 2, 3}

    def test_prompts_do_not_mix(self):
        assert find_contradictions(pairs_of("q A B", "r B A")) == ({}, 0)


class TestRepeats:
    def test_same_prompts_and_same_pairs(self):
        checks = check_pairs(pairs_of("q A B", "q C B", "q A B", "r A B"), [], near=False)
        assert checks.group == [0, 0, 0, 3]
        assert (checks.same_prompt, checks.duplicates, checks.near) == (2, {2: 0}, None)

    def test_nearly_the_same_prompt(self):
        text = "a-question-of-some-length-about-stains-on-shirts"
        pairs = pairs_of(f"{text} A B", f"{text}! A B", "other A B", f"{text}! C D")
        checks = check_pairs(pairs, [], near=True)
        assert checks.group == [0, 0, 2, 0]
        assert checks.near == {1: 0, 3: 0}
        assert checks.same_prompt == 1
        assert checks.duplicates == {}

    def test_prompts_of_the_held_out_data(self):
        text = "a-question-of-some-length-about-stains-on-shirts"
        pairs = pairs_of(f"{text} A B", "q A B", f"{text}! C D", "new A B")
        held = [pair(7, "q", "X", "Y", where="test"), pair(8, text, "X", "Y"), pair(9, text, "Z", "Y")]
        assert {n: one.row for n, one in check_pairs(pairs, held, near=False).held_out.items()} == {0: 8, 1: 7}
        assert {n: one.row for n, one in check_pairs(pairs, held, near=True).held_out.items()} == {0: 8, 1: 7, 2: 8}


class TestNumbers:
    def test_margins_in_nats_and_per_token(self):
        """−8 − (−6) = −2 nats; −8 / 4 − (−6 / 2) = +1 nat per token: the longer answer is the likelier by token."""
        found = Margins.of([pair(1, "q", "A", "B", tokens=(4, 2))], [(-8.0, -6.0)])
        assert (found.nats, found.per_token) == ([-2.0], [1.0])

    def test_length_gap(self):
        """Gaps 2, −1, 5, 0: mean 1.5, sorted −1 0 2 5, median 1, a half above 0."""
        gaps = [(4, 2), (1, 2), (6, 1), (3, 3)]
        found = length_gap([pair(n, "q", "A", "B", tokens=one) for n, one in enumerate(gaps)])
        assert (found["mean"], found["p50"], found["chosen_longer"]) == (1.5, 1.0, 0.5)

    def test_percentiles(self):
        assert percentiles(range(101)) == {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95}

    def test_lowest_first_and_ties_by_row(self):
        assert lowest([3.0, -1.0, 2.0, -1.0], 3) == [1, 3, 2]


class TestSuspects:
    PAIRS = pairs_of("q A B", "q B A", "r A B", "s A B", "s A B", "t A B")

    def found(self, margins=None, most=10):
        checks = check_pairs(self.PAIRS, [pair(2, "r", "X", "Y", where="test_datasets[0]")], near=False)
        return suspects(self.PAIRS, checks, margins, most)

    def test_worst_first_with_reasons_that_name_rows(self):
        assert self.found() == {
            0: ["contradicts datasets[0] row 2"],
            1: ["contradicts datasets[0] row 1"],
            2: ["the same prompt as held-out test_datasets[0] row 2"],
            4: ["the same pair as datasets[0] row 4"],
        }
        assert list(self.found()) == [0, 1, 2, 4]

    def test_the_reference_against_the_label_counts_if_it_is_among_the_lowest(self):
        margins = Margins([0.0] * 6, [1.0, -0.5, 1.0, -0.25, 1.0, 0.0])
        assert list(self.found(margins)) == [1, 0, 2, 3, 4]
        assert self.found(margins)[1][1] == "the reference prefers rejected by 0.50 nats per token"
        assert list(self.found(margins, most=1)) == [1]

    def test_no_more_than_asked_for(self):
        assert list(self.found(most=2)) == [0, 1]

    def test_a_prompt_that_is_nearly_held_out_is_said_to_be(self):
        text = "a-question-of-some-length-about-stains-on-shirts"
        pairs = pairs_of(f"{text} A B")
        checks = check_pairs(pairs, [pair(5, f"{text}!", "A", "B", where="test")], near=True)
        assert suspects(pairs, checks, None, 3) == {0: ["nearly the same prompt as held-out test row 5"]}

    def test_a_circle_names_no_single_row(self):
        pairs = pairs_of("q A B", "q B C", "q C A")
        found = suspects(pairs, check_pairs(pairs, [], near=False), None, 1)
        assert found == {0: ["contradicts other rows of its prompt, taken together"]}
