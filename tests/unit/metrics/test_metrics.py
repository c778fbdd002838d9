"""Metrics against values derived by hand and against numpy, on one rank and on several."""

import math
import pickle
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dpo_plugin.errors import DPOPluginError, RegistrationError
from dpo_plugin.metrics.aggregates import (
    OTHER_SOURCES,
    SOURCES_LOGGED,
    MetricMeans,
    margin_percentiles,
    source_figures,
)
from dpo_plugin.metrics.pair import METRICS, TRL_METRICS, needed_by, needs
from dpo_plugin.registry import get_registry
from dpo_plugin.types import PairLogps

FIELDS = [
    f"{group}/{side}"
    for group in ("entropy", "lengths", "logits", "logps", "logratios", "rewards")
    for side in ("chosen", "rejected")
]


def some_pairs(count: int, seed: int = 0, sources: Any = ()) -> PairLogps:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 60, (2, count), generator=draw).float()
    policy, reference = -tokens * torch.rand(2, count, generator=draw), -tokens * torch.rand(2, count, generator=draw)
    logits = torch.randn(2, count, generator=draw)
    return PairLogps(*policy, *reference, *tokens, *logits, beta=0.1, sources=sources)


def margins_of(logps: PairLogps) -> np.ndarray:
    return (logps.chosen_rewards - logps.rejected_rewards).double().numpy()


def part(logps: PairLogps, start: int, end: int) -> PairLogps:
    tensors = (
        logps.policy_chosen_logps, logps.policy_rejected_logps, logps.ref_chosen_logps, logps.ref_rejected_logps,
        logps.chosen_tokens, logps.rejected_tokens, logps.chosen_logits, logps.rejected_logits,
    )  # fmt: skip
    return PairLogps(*(t[start:end] for t in tensors), beta=logps.beta, sources=logps.sources[start:end])


class Ranks:
    """Collectives between threads, each of which is a rank; counts calls."""

    def __init__(self, size: int):
        self.size = size
        self.calls = 0
        self._slots: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=10)

    def _all(self, rank: int, value: Any) -> list[Any]:
        self._slots[rank] = pickle.dumps(value)
        self._barrier.wait()
        every = [pickle.loads(slot) for slot in self._slots]
        self.calls += rank == 0
        self._barrier.wait()
        return every

    def results(self, metrics: list[MetricMeans]) -> list[dict[str, float]]:
        found: list[Any] = [None] * self.size

        def rank(number: int) -> None:
            found[number] = metrics[number].result(lambda value: self._all(number, value))

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def on_ranks(batches: list[list[PairLogps]], **options: Any) -> tuple[dict[str, float], Ranks]:
    """Every rank's batches, and the result, which must be the same on all."""
    metrics = [MetricMeans(METRICS, **options) for _ in batches]
    for one, theirs in zip(metrics, batches, strict=True):
        for batch in theirs:
            one.update(batch)
    ranks = Ranks(len(batches))
    results = ranks.results(metrics)
    assert all(result == results[0] for result in results)
    return results[0], ranks


def test_every_metric_by_hand():
    """β = 0.5. Pair 1: r_w = 2, r_l = −2, margin 2. Pair 2: r_w = −3, r_l = 9, margin −6. Pair 3: r_w = 10, r_l = 0, margin 5."""
    logps = PairLogps(
        policy_chosen_logps=torch.tensor([-8.0, -13.0, -10.0]),
        policy_rejected_logps=torch.tensor([-12.0, -1.0, -5.0]),
        ref_chosen_logps=torch.tensor([-10.0, -10.0, -20.0]),
        ref_rejected_logps=torch.tensor([-10.0, -10.0, -5.0]),
        chosen_tokens=torch.tensor([4.0, 10.0, 5.0]),
        rejected_tokens=torch.tensor([2.0, 10.0, 10.0]),
        chosen_logits=torch.tensor([1.0, 2.0, 3.0]),
        rejected_logits=torch.tensor([0.0, 0.0, 3.0]),
        beta=0.5,
        chosen_entropy=torch.tensor([1.0, 2.0, 0.0]),
        rejected_entropy=torch.tensor([3.0, 3.0, 3.0]),
    )
    metrics = MetricMeans(METRICS)
    metrics.update(logps)
    expected = {
        "rewards/chosen": (1 - 1.5 + 5) / 3, "rewards/rejected": (-1 + 4.5 + 0) / 3, "rewards/margins": 1 / 3,
        "rewards/accuracies": 2 / 3, "rewards/negative_margins": 1 / 3,
        "rewards/saturated": 1 / 3,  # σ(5) = 0.9933, σ(2) = 0.88
        "logps/chosen": -31 / 3, "logps/rejected": -6.0,
        "logps/chosen_per_token": (-2 - 1.3 - 2) / 3, "logps/rejected_per_token": (-6 - 0.1 - 0.5) / 3,
        "logits/chosen": 2.0, "logits/rejected": 1.0, "logratios/chosen": 3.0, "logratios/rejected": 7 / 3,
        "logratios/margin_per_token": (0.5 + 1 - 0.3 - 0.9 + 2 - 0) / 3, "lengths/chosen": 19 / 3, "lengths/rejected": 22 / 3,
        "entropy/chosen": 1.0, "entropy/rejected": 3.0, "rewards/count": 3.0,
        "rewards/margins_p10": -6 + 0.2 * 8, "rewards/margins_p50": 2.0, "rewards/margins_p90": 2 + 0.8 * 3,
        "lengths/accuracy_chosen_longer": 1.0, "lengths/accuracy_chosen_shorter": 1.0,
        "logps/chosen_displacement": (0.5 - 0.3 + 2) / 3, "logps/rejected_displacement": (-1 + 0.9 + 0) / 3,
    }  # fmt: skip
    assert metrics.result() == pytest.approx(expected, abs=1e-6)


def test_the_groups_are_trls_and_the_new_ones_are_grouped_alike():
    metrics = MetricMeans(METRICS)
    metrics.update(some_pairs(20))
    names = set(metrics.result())
    assert set(TRL_METRICS) <= names
    assert {name for name in FIELDS if "entropy" not in name} <= names
    assert {name.split("/")[0] for name in names} == {"rewards", "logps", "logits", "logratios", "lengths"}


def test_many_batches_on_uneven_ranks_are_one_batch():
    pairs = some_pairs(97, sources=["web", "chat", "code"] * 32 + ["code"])
    whole, _ = on_ranks([[pairs]])
    parts, ranks = on_ranks([
        [part(pairs, 0, 10), part(pairs, 10, 11)],
        [part(pairs, 11, 60), part(pairs, 60, 61), part(pairs, 61, 90)],
        [part(pairs, 90, 97)],
    ])  # fmt: skip
    assert parts == pytest.approx(whole, rel=1e-9)
    assert ranks.calls == 1


def test_percentiles_and_correlation_are_numpys():
    pairs = some_pairs(250)
    found, _ = on_ranks([[part(pairs, 0, 33)], [part(pairs, 33, 250)]])
    margins = margins_of(pairs)
    longer = (pairs.chosen_tokens - pairs.rejected_tokens).double().numpy()
    for share in (10, 50, 90):
        assert found[f"rewards/margins_p{share}"] == pytest.approx(np.percentile(margins, share), abs=1e-5)
    assert found["lengths/margin_correlation"] == pytest.approx(np.corrcoef(margins, longer)[0, 1], abs=1e-9)
    assert found["lengths/accuracy_chosen_longer"] == pytest.approx((margins[longer > 0] > 0).mean())
    assert found["lengths/accuracy_chosen_shorter"] == pytest.approx((margins[longer < 0] > 0).mean())


@pytest.mark.parametrize("count", [2, 7])
def test_no_correlation_of_a_handful_of_pairs(count: int):
    found, _ = on_ranks([[some_pairs(count)]])
    assert "lengths/margin_correlation" not in found


def test_no_correlation_and_no_accuracy_where_lengths_are_equal():
    pairs = some_pairs(30)
    same = PairLogps(
        pairs.policy_chosen_logps, pairs.policy_rejected_logps, pairs.ref_chosen_logps, pairs.ref_rejected_logps,
        torch.full((30,), 7.0), torch.full((30,), 7.0), pairs.chosen_logits, pairs.rejected_logits, beta=0.1,
    )  # fmt: skip
    found, _ = on_ranks([[same]])
    assert not {name for name in found if name.startswith(("lengths/margin", "lengths/accuracy"))}


def test_sources_missing_on_some_ranks():
    """web on both ranks, chat on the first, code on the second; pairs and margins counted by numpy."""
    first, second = some_pairs(6, 1, ["web", "chat"] * 3), some_pairs(5, 2, ["code", "web", "code", "code", "web"])
    found, _ = on_ranks([[first], [second]])
    margins = np.concatenate([margins_of(first), margins_of(second)])
    sources = np.array([*first.sources, *second.sources])
    for source in ("web", "chat", "code"):
        its = margins[sources == source]
        assert found[f"rewards/count/{source}"] == len(its)
        assert found[f"rewards/margins/{source}"] == pytest.approx(its.mean(), abs=1e-6)
        assert found[f"rewards/accuracies/{source}"] == pytest.approx((its > 0).mean())
    assert found["rewards/count"] == 11


@pytest.mark.parametrize(
    ("sources", "fields"),
    [
        ((["web"] * 4, ["web"] * 4, ["web"] * 4), 0),
        ((["web"] * 4, None, ["web"] * 4), 0),
        ((["web"] * 4, ["chat"] * 4, ["web"] * 4), 2),
        ((["web"] * 4, None, ["chat"] * 4), 2),
        (([""] * 4, ["chat", "", "", ""], None), 2),
        (((), (), ()), 0),
    ],
)
def test_sources_have_fields_only_where_there_are_several(sources: Any, fields: int):
    batches = [[some_pairs(4, rank, names)] if names is not None else [] for rank, names in enumerate(sources)]
    found, ranks = on_ranks(batches)
    assert len([name for name in found if name.startswith("rewards/count/")]) == fields
    assert ranks.calls == 1


def test_every_mix_of_a_few_sources_is_told():
    def several(*ranks: list[str]) -> bool:
        names = [name for rank in ranks for name in rank]
        return bool(source_figures(names, torch.zeros(len(names))))

    names = [f"source {number}" for number in range(40)]
    assert not any(several([name], [name], [], [name]) for name in names)
    assert all(several([one], [other], []) for one in names for other in names if one != other)
    assert several(names[:2], [])


def test_beyond_twenty_sources_the_smaller_ones_are_summed_up():
    sources = [f"s{number:02}" for number in range(25) for _ in range(1 + (number < 19))]
    pairs = some_pairs(len(sources), 3, sources)
    found, _ = on_ranks([[pairs]])
    counts = {name: value for name, value in found.items() if name.startswith("rewards/count/")}
    assert len(counts) == SOURCES_LOGGED + 1
    assert counts[f"rewards/count/{OTHER_SOURCES}"] == 5
    assert sum(counts.values()) == len(sources) == found["rewards/count"]


def test_a_rank_without_pairs_takes_part():
    pairs = some_pairs(12, 5, ["web", "chat"] * 6)
    assert on_ranks([[], [pairs], []])[0] == pytest.approx(on_ranks([[pairs]])[0], rel=1e-9)


def test_without_any_pair_there_is_nothing_and_everything_starts_anew():
    metrics = MetricMeans(METRICS)
    assert metrics.result() == {}
    metrics.update(some_pairs(9, 1, ["a", "b", "c"] * 3))
    first = metrics.result()
    assert metrics.result() == {}
    metrics.update(some_pairs(9, 1, ["a", "b", "c"] * 3))
    assert metrics.result() == first


def test_percentiles_are_of_all_pairs():
    levels = margin_percentiles(torch.arange(50_001.0))
    assert list(levels.values()) == [5_000, 25_000, 45_000]


def test_displacement_is_against_the_first_line_where_the_reference_is_another():
    """−2 and −4 nats per token at first, −3 and −4.5 later: moved by −1 and −0.5, whatever the reference."""

    def at(chosen: float, rejected: float) -> PairLogps:
        ones = torch.ones(3)
        return PairLogps(
            5 * chosen * ones, 2 * rejected * ones, -9 * ones, ones, 5 * ones, 2 * ones, ones, ones, beta=0.1
        )

    metrics = MetricMeans(METRICS, starts_as_reference=False)
    metrics.update(at(-2, -4))
    assert metrics.result()["logps/chosen_displacement"] == 0
    metrics.update(at(-3, -4.5))
    resumed = MetricMeans(METRICS, starts_as_reference=False)
    resumed.start = metrics.start
    resumed.update(at(-3, -4.5))
    for one in (metrics, resumed):
        later = one.result()
        assert (later["logps/chosen_displacement"], later["logps/rejected_displacement"]) == pytest.approx((-1, -0.5))


def test_displacement_is_zero_at_step_zero_whatever_the_batch():
    pairs = some_pairs(10)
    same = PairLogps(
        pairs.policy_chosen_logps, pairs.policy_rejected_logps, pairs.policy_chosen_logps, pairs.policy_rejected_logps,
        pairs.chosen_tokens, pairs.rejected_tokens, pairs.chosen_logits, pairs.rejected_logits, beta=0.1,
    )  # fmt: skip
    found, _ = on_ranks([[same]])
    zero = ("rewards/margins", "rewards/negative_margins", "logps/chosen_displacement", "logps/rejected_displacement")
    assert [found[name] for name in zero] == [0, 0, 0, 0]


def test_a_metric_that_says_none_is_left_out_and_one_that_says_it_once_is_averaged_over_the_rest():
    answers = iter([None, torch.tensor([1.0, 3.0]), None])
    metrics = MetricMeans({"mine/never": lambda _: None, "mine/once": lambda _: next(answers)})
    for _ in range(3):
        metrics.update(some_pairs(2))
    found = metrics.result()
    assert found["mine/once"] == 2
    assert "mine/never" not in found


def test_a_third_partys_metric_is_a_mean_over_pairs():
    metrics = MetricMeans({"mine/longer": lambda logps: logps.chosen_tokens > logps.rejected_tokens})
    pairs = some_pairs(40)
    metrics.update(pairs)
    expected = (pairs.chosen_tokens > pairs.rejected_tokens).float().mean().item()
    assert metrics.result()["mine/longer"] == pytest.approx(expected)


def test_a_metric_declares_what_must_be_computed_for_it():
    @needs("entropy")
    def certainty(logps: PairLogps) -> torch.Tensor:
        return -logps.chosen_entropy

    assert needed_by([certainty]) == needed_by([METRICS["entropy/chosen"]]) == {"entropy"}
    assert needed_by(TRL_METRICS.values()) == frozenset()
    with pytest.raises(RegistrationError, match=r"'entropi', which is not computed.*Write: @needs\(.entropy.\)$"):
        needs("entropi")


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (lambda logps: logps.chosen_rewards.mean(), r"returned shape \(\) for 4 pairs, not a Tensor of shape \(4,\)"),
        (lambda logps: logps.chosen_rewards[:2], r"returned shape \(2,\) for 4 pairs"),
        (lambda logps: 0.5, "returned float for 4 pairs"),
        (lambda logps: logps.no_such_field, "raised AttributeError: .*no_such_field"),
    ],
)
def test_a_metric_that_fails_is_named_with_its_owner(metric: Any, words: str):
    metrics = MetricMeans(
        {"a/fine": METRICS["rewards/chosen"], "their/metric": metric}, {"their/metric": "their-package"}.get
    )
    with pytest.raises(DPOPluginError, match=rf"'their/metric' of their-package {words}.*Write: metrics: \[a/fine\]$"):
        metrics.update(some_pairs(4))


def test_sums_keep_their_digits_over_many_pairs():
    """Lengths around 4000 differing by 1: a variance that fp32 sums of squares would lose."""
    draw = torch.Generator().manual_seed(1)
    count = 4000
    longer = torch.randint(0, 2, (count,), generator=draw).float()
    pairs = some_pairs(count)
    made = PairLogps(
        longer * 10 + 5000, torch.zeros(count), torch.zeros(count), torch.zeros(count), 4000 + longer,
        torch.zeros(count), pairs.chosen_logits, pairs.rejected_logits, beta=1.0,
    )  # fmt: skip
    found, _ = on_ranks([[made]])
    assert found["lengths/margin_correlation"] == pytest.approx(1.0, abs=1e-6)


def test_the_metrics_come_through_the_hook():
    names = get_registry().metrics
    assert {name: names[name] for name in METRICS} == dict(METRICS)


def test_no_gradient_is_kept():
    pairs = some_pairs(4)
    policy = pairs.policy_chosen_logps.clone().requires_grad_()
    made = PairLogps(
        policy, pairs.policy_rejected_logps, pairs.ref_chosen_logps, pairs.ref_rejected_logps, pairs.chosen_tokens,
        pairs.rejected_tokens, pairs.chosen_logits, pairs.rejected_logits, beta=0.1, sources=["a", "b", "a", "b"],
    )  # fmt: skip
    metrics = MetricMeans(METRICS)
    metrics.update(made)
    assert not any(table.requires_grad for _, table in metrics._tables)
    assert math.isfinite(metrics.result()["rewards/margins/a"])


@pytest.mark.parametrize("picked", [[2, 0], [], [0, 1, 2]])
def test_some_pairs_alone(picked):
    pairs = replace(some_pairs(3, sources=["a", "b", "c"]), chosen_entropy=torch.arange(3.0))
    alone = pairs.only(picked)
    for column in ("policy_chosen_logps", "ref_rejected_logps", "rejected_tokens", "chosen_entropy"):
        assert getattr(alone, column).tolist() == getattr(pairs, column)[picked].tolist()
    assert list(alone.sources) == [pairs.sources[n] for n in picked]
    assert alone.rejected_entropy is None
    assert alone.beta == pairs.beta
