"""Each thing against values derived by hand. What a run does with them, dpo-plugin's own tests show."""

import math
from types import SimpleNamespace

import pytest
import torch
from dpo_plugin_example import HalfwayReference, chosen_perplexity, dpop, helpsteer3, json_keys, slowing_down

from dpo_plugin import (
    Columns,
    CompletionLogps,
    History,
    LossOptions,
    PairLogps,
    RowError,
)

ROW = {
    "domain": "general",
    "context": [{"role": "user", "content": "Are tomatoes fruit?"}],
    "response1": "Yes, botanically.",
    "response2": "No.",
}


@pytest.mark.parametrize(
    ("better", "chosen", "rejected"), [(-3, "Yes, botanically.", "No."), (1, "No.", "Yes, botanically.")]
)
def test_the_preferred_answer_is_chosen(better, chosen, rejected):
    pair = helpsteer3({**ROW, "overall_preference": better}, Columns())
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == (chosen, rejected)
    assert pair.prompt == ROW["context"]
    assert pair.source == "general"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"overall_preference": 0}, "neither"),
        ({}, "neither"),
        ({"context": "Hi"}, "messages"),
        ({"response2": None}, "texts"),
    ],
)
def test_a_row_without_a_preference_or_a_text_is_refused(change, says):
    with pytest.raises(RowError, match=says):
        helpsteer3({**ROW, **change}, Columns())


def pairs(chosen, rejected=(0.0, 0.0), ref=(-4.0, -4.0)):
    zeros, tokens = torch.zeros(len(chosen)), torch.full((len(chosen),), 4.0)
    return PairLogps(
        policy_chosen_logps=torch.tensor(chosen),
        policy_rejected_logps=torch.tensor(rejected),
        ref_chosen_logps=torch.tensor(ref),
        ref_rejected_logps=zeros,
        chosen_tokens=tokens,
        rejected_tokens=tokens,
        chosen_logits=zeros,
        rejected_logits=zeros,
        beta=0.1,
    )


def test_the_penalty_counts_only_where_chosen_has_fallen():
    """r_w = 1 and −1: −log σ(0.1 · 1), and −log σ(0.1 · (−1 − 5))."""
    found = dpop(pairs([-3.0, -5.0]), LossOptions(beta=0.1))
    assert found.tolist() == pytest.approx([math.log1p(math.exp(-0.1)), math.log1p(math.exp(0.6))], abs=1e-6)


def test_perplexity_is_per_token():
    assert chosen_perplexity(pairs([0.0, -4 * math.log(3)])).tolist() == pytest.approx([1.0, 3.0])


def test_the_reference_is_half_way():
    """It asks for the model with the reference adapter and without one, through the forward that it is given."""
    entered = []

    class Policy:
        def __init__(self, name=""):
            self.name, self.digests = name, {"reference": "abc"}

        def reference_active(self):
            return Policy("adapter")

        def adapters_off(self):
            return Policy("base")

        def __enter__(self):
            entered.append(self.name)

        def __exit__(self, *_):
            pass

    def forward(model, batch):
        sums = torch.tensor([-2.0, -6.0]) if entered[-1] == "adapter" else torch.tensor([-4.0, -6.0])
        return CompletionLogps(sums, torch.ones(2), torch.zeros(2))

    strategy = SimpleNamespace(policy=Policy())
    assert HalfwayReference.run(strategy, "model", "batch", forward).sums.tolist() == [-3.0, -6.0]
    assert HalfwayReference.identity(strategy) == "halfway abc"
    assert entered == ["adapter", "base"]


def history(speeds):
    run = History()
    for step, speed in enumerate(speeds, 1):
        run.add({"step": step, "speed/pairs_per_second": speed})
    return run


def test_a_run_that_slows_down_is_found():
    assert slowing_down(history([8.0] * 19)) is None
    assert slowing_down(history([8.0] * 10 + [4.0] * 10)) is None
    found = slowing_down(history([8.0] * 10 + [3.0] * 10))
    assert found is not None
    assert found.first_step == 11
    assert found.numbers == {"speed/pairs_per_second": 3.0}


@pytest.mark.parametrize(
    ("answer", "score"),
    [('{"name": 1, "age": 2}', 1.0), ('{"name": 1}', 0.5), ("{}", 0.0), ('["name"]', 0.0), ("no", 0.0), ("", 0.0)],
)
def test_an_answer_is_scored_by_its_keys(answer, score):
    assert json_keys("Who?", answer, {"keys": ["name", "age"]}) == score
    assert json_keys("Who?", answer, {}) == float(answer.startswith("{"))
