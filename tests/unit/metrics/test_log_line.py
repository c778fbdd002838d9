"""The short line of a logging step."""

import pytest

from dpo_plugin.metrics.log_line import duration, summary


def test_a_training_step():
    line = {
        "loss": 0.58131,
        "rewards/accuracies": 0.75,
        "rewards/margins": 0.2377,
        "learning_rate": 0.00001,
        "speed/pairs_per_second": 12.345,
        "logps/chosen": -80.0,
    }
    assert summary(line, 7, 120) == (
        "step   7/120  loss 0.5813  accuracy 0.75  margin +0.238  lr 1.0e-05  12.3 pairs/s"
    )


def test_a_step_of_several_losses_shows_each():
    line = {"loss": 2.0012, "loss/sigmoid": 0.693147, "loss/sft": 1.30805, "rewards/margins": 0.0}
    assert summary(line, 1, 9) == "step 1/9  loss 2.0012 (sigmoid 0.6931, sft 1.3080)  margin +0.000"
    held_out = {f"eval_{name}": value for name, value in line.items()}
    assert summary(held_out, 1, 9) == "step 1/9  held-out  loss 2.0012 (sigmoid 0.6931, sft 1.3080)  margin +0.000"


def test_nothing_is_ranked_before_the_first_update():
    line = {"loss": 0.693147, "rewards/accuracies": 0.0, "rewards/margins": 0.0}
    assert summary(line, 1, 9) == "step 1/9  loss 0.6931  margin +0.000"
    assert "accuracy 0.00" in summary({**line, "rewards/margins": -0.1}, 2, 9)


@pytest.mark.parametrize(("prefix", "name"), [("eval_", "held-out"), ("eval_code_", "held-out_code")])
def test_an_evaluation(prefix, name):
    line = {f"{prefix}loss": 0.5, f"{prefix}rewards/margins": -1.0, f"{prefix}samples_per_second": 3.0, "epoch": 1.0}
    assert summary(line, 7, 120) == f"step   7/120  {name}  loss 0.5000  margin -1.000  3 pairs/s"


def test_an_evaluation_without_training():
    assert summary({"eval_loss": 0.5}, 0, 0) == "held-out  loss 0.5000"


def test_the_end_of_a_run_and_a_line_of_another_trainer():
    assert (
        summary({"train_runtime": 83.2, "train_samples_per_second": 5.901}, 20, 20)
        == "20 steps in 1 min 23 s, 5.9 pairs/s"
    )
    assert summary({"reward_std": 1.0}, 1, 2) == ""


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 59.4, 60, 3599.6, 7384)] == [
        "0 s", "59 s", "1 min 00 s", "1 h 00 min", "2 h 03 min",
    ]  # fmt: skip
