"""Win rates, their interval against SciPy's, and the divergence of the policy's own answers."""

import pytest
from scipy.stats import binomtest

from dpo_plugin.config import PairsConfig
from dpo_plugin.samples.records import Answer, Sample
from dpo_plugin.samples.scorers import CheckedScorer
from dpo_plugin.samples.win_rate import Judged, WinRate, divergence, judged_table, scored


def sample(mine, theirs, reward=0.0, tokens=1):
    reference = None if theirs is None else Answer("r", 1, True, 0.0, theirs)
    return Sample(1, "<user>Why?", Answer("p", tokens, True, reward, mine), reference, "Why?")


def test_answers_are_counted_by_their_scores():
    found = WinRate.of([sample(2, 1), sample(1, 1), sample(0, 1), sample(5, 1), sample(9, None)])
    assert found == WinRate(2, 1, 1)
    assert found.rate == 0.625
    assert str(found).startswith("win rate 0.625 (95 %: ")
    assert "2 won, 1 tied, 1 lost" in str(found)
    assert WinRate.of([sample(None, None), sample(1, None)]) is None
    assert WinRate.of([]) is None


@pytest.mark.parametrize(("wins", "losses"), [(0, 5), (5, 0), (3, 4), (60, 40), (1, 999)])
def test_the_interval_is_wilsons(wins, losses):
    expected = binomtest(wins, wins + losses).proportion_ci(method="wilson")
    assert WinRate(wins, 0, losses).interval == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_both_answers_are_scored_with_the_row_of_their_prompt():
    seen = []

    def by_row(prompt, answer, row):
        seen.append((prompt, answer, row))
        return row.get(answer, 0)

    given = [sample(None, 0), Sample(1, "<user>Which?", Answer("p", 1, True, 0.0), None)]
    found = scored(given, [{"p": 3, "r": 4}, {}], CheckedScorer.make("by_row", by_row, PairsConfig()))
    assert [(one.policy.score, one.reference and one.reference.score) for one in found] == [(3, 4), (0, None)]
    assert [prompt for prompt, *_ in seen] == ["Why?", "Why?", "<user>Which?"]


def test_divergence_is_the_mean_log_ratio_per_token():
    samples = [sample(1, 0, reward=0.2, tokens=4), sample(0, 0, reward=-0.05, tokens=6)]
    assert divergence(samples, beta=0.1) == pytest.approx((2 - 0.5) / 10)
    assert Judged.of(samples, 1, 0.1) == Judged(WinRate(1, 1, 0), 0.5, 0, pytest.approx(0.15))
    assert Judged.of(samples, 0.7, 0.1).divergence is None
    assert Judged.of([sample(1, None)], 1, 0.1) is None
    assert judged_table({1.0: Judged.of(samples, 1, 0.1)}).row_count == 1
