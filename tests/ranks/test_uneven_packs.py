"""Rows of which one rank makes four packs and the other one: evaluation, reference pass and steps keep together."""

import pytest

from tests.ranks.shipped import config, curve
from tests.support.cpu_ranks import launch
from tests.support.tiny import chat_row, write_rows

STEPS, TOKENS = 3, 420
HELD_OUT = 9
"""Pairs of which the last batches of two ranks hold one, and seven that are there twice."""


def rows(count, seed):
    """Four long pairs, four short ones, and so on; a batch of four is one rank's."""
    for n in range(count):
        long = n // 4 % 2 == 0
        chosen, rejected = (f"Answer {seed} {n} is {word}. " for word in ("good", "bad"))
        times = 12 if long else 1
        yield chat_row(f"What is {n} plus {seed}?", chosen * times, rejected * times, "ab"[long])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")

    def one(name, count, seed):
        file = write_rows(folder / f"{name}.jsonl", list(rows(count, seed)))
        return [{"path": str(file), "ds_type": "json", "type": "dpo_plugin.chat", "split": "train"}]

    return {"datasets": one("train", 24, 0), "test_datasets": one("held_out", HELD_OUT, 1)}


def train(name, base_dir, sft, data, folder, ranks, **settings):
    settings = {
        **data,
        "max_steps": STEPS,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-4,
        "eval_steps": 1,
        "save_strategy": "no",
        "save_steps": None,
        "dpo_plugin": {"compute": {"max_tokens": TOKENS}, "reference": {"cache": str(folder / "kept")}},
        "micro_batch_size": 8 // ranks,
        **settings,
    }
    return launch(config(name, base_dir, sft, folder, **settings), folder, ranks=ranks)


@pytest.fixture(scope="module")
def alone(base_dir, sft, data, tmp_path_factory):
    run = train("ddp-nf4", base_dir, sft, data, tmp_path_factory.mktemp("alone"), ranks=1)
    assert run.returncode == 0, run.error()
    return run


@pytest.mark.parametrize(
    ("name", "precompute"), [("ddp-nf4", False), ("zero3-nf4", True), ("fsdp2-nf4", True)], ids=lambda value: str(value)
)
def test_ranks_that_pack_differently_keep_together(name, precompute, alone, base_dir, sft, data, tmp_path):
    run = train(name, base_dir, sft, data, tmp_path, ranks=2, precompute_ref_log_probs=precompute)
    assert run.returncode == 0, run.error()
    assert (curve(run.lines) - curve(alone.lines)).abs().max() <= 2e-3
    assert len(run.evaluations) == len(alone.evaluations) == STEPS + 1
    for found, expected in zip(run.evaluations, alone.evaluations, strict=True):
        assert found["eval_rewards/count"] == HELD_OUT
        assert (found["eval_rewards/count/a"], found["eval_rewards/count/b"]) == (4, 5)
        assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=2e-3)
        assert found["eval_rewards/margins"] == pytest.approx(expected["eval_rewards/margins"], abs=4e-3)
    assert run.evaluations[-1]["eval_rewards/margins"] > 0.1, "the policy must have moved for this to mean something"
