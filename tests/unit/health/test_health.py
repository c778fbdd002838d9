"""Each health check on a run that has its fault, and all of them on runs that have none."""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dpo_plugin.health.checks import CHECKS
from dpo_plugin.health.history import History
from dpo_plugin.health.monitor import HealthMonitor, replay
from dpo_plugin.registry import get_registry
from dpo_plugin.types import Finding, RunFacts

Line = dict[str, Any]
ROOT = Path(__file__).parents[3]

FACTS = RunFacts(
    beta=0.1, learning_rate=1e-5, losses=("sigmoid",), adapter_dtype="float32", lora_r=16, trainable_share=0.01,
    sequence_len=2048, planned_steps=200, epochs=1.0, starts_as_reference=True, reference_fixed=True,
)  # fmt: skip
AUDIT = {"where": "datasets[0]", "path": "pairs.jsonl", "kept": 900, "cut": 30, "left_out": {"too long": 20, "empty": 3},
         "sequence_len_for_95_percent": 1900}  # fmt: skip


def recorded(name: str) -> tuple[list[Line], RunFacts, Any]:
    """A recorded run: a row of values per logged line, null where the line has no such field."""
    run = json.loads((ROOT / "tests/data" / f"{name}.json").read_text(encoding="utf-8"))
    rows = [dict(zip(run["fields"], row, strict=True)) for row in run["rows"]]
    lines = [{field: value for field, value in row.items() if value is not None} for row in rows]
    return lines, RunFacts.from_dict(run["facts"]), run["audits"]


def healthy_lines(steps: int = 200, seed: int = 0, gain: float = 1.0, noise: float = 0.05) -> Iterator[Line]:
    """A run that learns: the margin rises to `gain`, accuracy with it; an evaluation every fifty steps.

    The rate warms up over a tenth of the steps and then falls. Rewards carry noise, so they fill a float's digits.
    """
    draw = random.Random(seed)
    for step in range(1, steps + 1):
        done = max(0, step - 1) / steps
        rise = gain * (1 - math.exp(-4 * done**1.5))
        wobble = draw.gauss(0, noise) * min(1.0, 4 * done)
        chosen, rejected = 0.2 * rise + wobble, -0.8 * rise + draw.gauss(0, noise) * min(1.0, 4 * done)
        yield train_line(step, chosen, rejected, min(1.0, step / (0.1 * steps)) * (1 - done) * 1e-5, draw)
        if step % max(1, steps // 4) == 0:
            yield eval_line(step, 0.7 * rise, 0.5 + 0.3 * math.tanh(3 * rise))


def train_line(step: int, chosen: float, rejected: float, rate: float, draw: random.Random) -> Line:
    margin = chosen - rejected
    return {
        "step": step, "epoch": step / 200, "learning_rate": rate, "loss": math.log1p(math.exp(-margin)),
        "grad_norm": draw.uniform(1.0, 4.0), "rewards/chosen": chosen, "rewards/rejected": rejected,
        "rewards/margins": margin, "rewards/accuracies": 0.5 + 0.4 * math.tanh(margin), "rewards/saturated": 0.0,
        "logps/chosen": -250 + 10 * chosen + draw.gauss(0, 20), "logps/rejected": -220 + 10 * rejected + draw.gauss(0, 20),
        "logps/chosen_displacement": chosen / 20, "logps/rejected_displacement": rejected / 20,
        "lengths/chosen": 200 + draw.gauss(0, 30), "lengths/rejected": 180 + draw.gauss(0, 30),
        "lengths/margin_correlation": draw.gauss(0.2, 0.2),
        "lengths/accuracy_chosen_shorter": 0.5 + 0.2 * math.tanh(margin),
        "lengths/accuracy_chosen_longer": 0.5 + 0.45 * math.tanh(margin), "weights/changed": 0.99,
    }  # fmt: skip


def eval_line(step: int, margin: float, accuracy: float) -> Line:
    return {
        "step": step, "eval_loss": math.log1p(math.exp(-margin)), "eval_rewards/accuracies": accuracy,
        "eval_rewards/margins": margin, "eval_rewards/chosen": 0.3 * margin, "eval_rewards/count": 200.0,
        "eval_logps/chosen": -250 + 3 * margin, "eval_runtime": 1.5,
    }  # fmt: skip


def run(lines: Any, facts: RunFacts = FACTS, audits: Any = (AUDIT,)) -> dict[str, Finding]:
    """Every check at every line; what they found at any of them."""
    monitor = HealthMonitor(CHECKS, History(facts, audits))
    for line in lines:
        monitor.add(line)
    return monitor.findings


def changed(change: Callable[[Line], Line], facts: RunFacts = FACTS, since: int = 1, **options: Any) -> Any:
    """A healthy run with its training lines changed."""
    lines = [
        {**line, **(change(line) if line["step"] >= since and "loss" in line else {})}
        for line in healthy_lines(**options)
    ]
    return lines, facts, (AUDIT,)


def bf16(value: float) -> float:
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 256) / 256, exponent)


def evaluated(change: Callable[[int], Line], train: Line) -> Any:
    """A healthy run whose training lines get some fields, and whose evaluations, number 0 to 3, others."""
    lines, number = [], 0
    for line in healthy_lines():
        if "eval_loss" in line:
            lines.append({**line, **change(number)})
            number += 1
        else:
            lines.append({**line, **train})
    return lines, FACTS, (AUDIT,)


def published_run() -> Any:
    """The 72B run whose maximum length of 32 left no completion token: ten steps, as its log has them."""
    line = {"loss": 0.6931, "grad_norm": 0.0, "rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0,
            "rewards/accuracies": 0.0, "logps/chosen": 0.0, "logps/rejected": 0.0, "logits/chosen": math.nan,
            "logits/rejected": math.nan}  # fmt: skip
    return [{"step": step, "learning_rate": 5e-5, **line} for step in range(1, 11)], RunFacts(), ()


FAULTS: dict[str, Callable[[], Any]] = {
    "no_completion_tokens": published_run,
    "pairs_mostly_cut": lambda: (healthy_lines(), FACTS, ({**AUDIT, "cut": 700},)),
    "step_zero_identity": lambda: changed(lambda line: {"rewards/chosen": line["rewards/chosen"] - 0.3}),
    "not_finite": lambda: changed(lambda line: {"loss": math.nan}, since=50),
    "gradient_vanished": lambda: changed(lambda line: {"grad_norm": 0.0}, since=20),
    "gradient_exploded": lambda: changed(lambda line: {"grad_norm": 80.0 * line["grad_norm"]}, since=90),
    "loss_diverged": lambda: changed(lambda line: {"loss": 1.3 + line["loss"]}, since=100),
    "loss_at_ln2": lambda: (healthy_lines(gain=1e-4, noise=1e-4), FACTS, ()),
    "margin_not_rising": lambda: changed(lambda line: {"rewards/margins": math.sin(line["step"]) / 5}),
    "accuracy_at_chance": lambda: evaluated(lambda _: {"eval_rewards/accuracies": 0.51}, {}),
    "likelihood_displacement": lambda: changed(
        lambda line: {"logps/chosen_displacement": -line["step"] / 150, "logps/rejected_displacement": -line["step"] / 90}
    ),
    "overfitting": lambda: evaluated(
        lambda number: {"eval_loss": (0.6, 0.45, 0.52, 0.71)[number], "eval_rewards/accuracies": 0.7},
        {"rewards/accuracies": 0.99},
    ),
    "length_exploitation": lambda: changed(
        lambda line: {"lengths/margin_correlation": 0.8, "lengths/accuracy_chosen_shorter": 0.2}
    ),
    "saturated_pairs": lambda: changed(lambda line: {"rewards/saturated": 0.95}, since=30),
    "quantised_rewards": lambda: changed(
        lambda line: {key: bf16(line[key]) for key in ("rewards/chosen", "rewards/rejected")}
    ),
    "learning_rate_below_precision": lambda: changed(
        lambda _: {"weights/changed": 0.018}, replace(FACTS, adapter_dtype="bfloat16")
    ),
    "reference_drift": lambda: evaluated(lambda number: {"eval_logps/chosen": -250.0 - 4 * number}, {}),
}  # fmt: skip
"""For each check a run with its fault."""

SAME_CAUSE = {
    "no_completion_tokens": {"gradient_vanished", "loss_at_ln2"},
    "loss_at_ln2": {"accuracy_at_chance"},
}
"""What the same run rightly shows besides."""


def test_every_check_has_a_faulty_run():
    assert sorted(FAULTS) == sorted(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_fault_is_found_and_nothing_else(name: str):
    found = run(*FAULTS[name]())
    assert name in found
    assert set(found) - {name} <= SAME_CAUSE.get(name, set())
    finding = found[name]
    assert finding.check == name
    assert finding.severity == CHECKS[name].severity
    assert "Write: " in finding.advice
    assert 0 <= finding.first_step <= finding.last_step
    assert all(math.isfinite(number) for number in finding.numbers.values())


def test_a_recorded_healthy_run_has_no_finding():
    lines, facts, audits = recorded("healthy")
    assert len(lines) == 69
    assert run(lines, facts, audits) == {}


def test_a_recorded_run_with_forty_times_the_learning_rate_is_told_to_lower_it():
    found = run(*recorded("diverged"))
    assert set(found) == {"accuracy_at_chance", "likelihood_displacement", "loss_diverged", "margin_not_rising"}
    assert {finding.advice.rpartition("Write: ")[2] for finding in found.values()} == {"learning_rate: 0.003"}
    assert found["loss_diverged"].first_step < 10


def test_a_recorded_run_that_learned_within_its_first_lines_has_no_finding():
    """LoRA at a rate of 5e-3: loss 0.693 → 0.0026 in 14 log lines, every held-out pair ranked right."""
    lines, facts, audits = recorded("learned_fast")
    assert [line["loss"] for line in lines if "loss" in line][::13] == [0.69315, 0.0026311]
    assert run(lines, facts, audits) == {}


def test_a_recorded_run_on_labels_half_of_which_are_swapped_overfits():
    """96 pairs, twelve epochs: training accuracy 1, held-out loss 0.693 → 1.41 from step 0 on, where accuracy is 0."""
    found = run(*recorded("swapped_labels"))
    assert set(found) == {"overfitting", "accuracy_at_chance"}
    assert found["overfitting"].numbers["lowest"] == 0.69315
    assert found["overfitting"].advice.endswith("Write: num_epochs: 1")


def falling(losses: list[float], first: float = 0.69) -> list[Line]:
    return [
        {"step": 5 * number, "learning_rate": 1e-4, "loss": loss, "rewards/accuracies": 1.0}
        for number, loss in enumerate([first, *losses], start=1)
    ]


@pytest.mark.parametrize("losses", [("sigmoid",), ("apo_zero",), ()])
@pytest.mark.parametrize("tail", [[2e-4] * 9, [2e-4, 5e-4] * 20])
def test_a_loss_that_falls_to_nothing_within_the_first_lines_has_not_diverged(losses: Any, tail: list[float]):
    """The least of the first lines is 2e-4, and the mean of the last ten, of which some are of the start, 400 times it."""
    facts = replace(FACTS, losses=losses, planned_steps=300)
    assert run(falling([0.1, 2e-4, 2e-4, 2e-4, *tail]), facts, ()) == {}


@pytest.mark.parametrize(
    ("losses", "first", "last"), [(("sigmoid",), 0.69, 1.1), (("ipo",), 25.0, 40.0), ((), 2.5, 4.0)]
)
def test_a_loss_that_rises_above_its_start_has_diverged(losses: Any, first: float, last: float):
    lines = falling([first / 3] * 9 + [last] * 10, first)
    assert set(run(lines, replace(FACTS, losses=losses), ())) == {"loss_diverged"}


def course(held_out: list[float], accuracy: list[float], pairs: float = 64.0) -> Any:
    """Training accuracy 1 and evaluations with these losses and accuracies."""
    lines = []
    for number, (loss, right) in enumerate(zip(held_out, accuracy, strict=True), start=1):
        for step in range(20 * number - 19, 20 * number + 1):
            margin = 3.0 + 0.1 * math.sin(step)
            lines.append({"step": step, "learning_rate": 1e-5, "loss": math.log1p(math.exp(-margin)),
                          "rewards/margins": margin, "rewards/accuracies": 1.0})  # fmt: skip
        lines.append(
            {"step": 20 * number, "eval_loss": loss, "eval_rewards/accuracies": right, "eval_rewards/count": pairs}
        )
    return lines, replace(FACTS, planned_steps=140), ()


RISING = [0.677, 0.684, 0.699, 0.711, 0.72, 0.733, 0.744]


@pytest.mark.parametrize(
    ("held_out", "accuracy", "found"),
    [
        (RISING, [0.56, 0.58, 0.55, 0.58, 0.56, 0.55, 0.56], True),  # by 9.9 %, six times in a row
        (RISING, [0.5, 0.52, 0.55, 0.58, 0.56, 0.55, 0.56], True),  # of 64 pairs 0.06 more is no more than chance
        (
            RISING,
            [0.5, 0.56, 0.6, 0.65, 0.68, 0.7, 0.72],
            False,
        ),  # its loss is more certain, and its answers are better
        ([0.677, 0.71, 0.69, 0.72, 0.7, 0.73, 0.72], [0.6] * 7, False),  # up and down
        ([0.677, 0.68, 0.682, 0.683, 0.685, 0.687, 0.69], [0.6] * 7, False),  # up by 2 %
    ],
)
def test_a_steady_rise_of_the_held_out_loss_is_overfitting(held_out: Any, accuracy: Any, found: bool):
    assert ("overfitting" in run(*course(held_out, accuracy))) == found


@pytest.mark.parametrize("seed", range(5))
def test_made_healthy_runs_have_no_finding(seed: int):
    assert run(healthy_lines(seed=seed)) == {}


@pytest.mark.parametrize(
    ("steps", "gain", "noise"),
    [
        (10, 0.3, 0.05),  # a trial of a few steps
        (40, 1.0, 0.5),  # one pair a step
        (2000, 0.2, 0.05),  # a small rate and a long warm-up: the margin is near 0 for hundreds of steps
        (200, 6.0, 1.0),  # a small data set learned by heart towards the end
    ],
)
def test_unusual_but_healthy_runs_have_no_finding(steps: int, gain: float, noise: float):
    assert run(healthy_lines(steps, 1, gain, noise), replace(FACTS, planned_steps=steps)) == {}


def test_the_published_run_without_completions_is_found_from_its_log_alone():
    found = run(*published_run())
    assert set(found) == {"no_completion_tokens", "gradient_vanished", "loss_at_ln2"}
    assert found["no_completion_tokens"].first_step == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no_completion_tokens", "Write: sequence_len: 2048"),
        ("pairs_mostly_cut", "Write: sequence_len: 8192"),
        ("loss_at_ln2", "Write: learning_rate: 0.0001"),
        ("likelihood_displacement", "Write: dpo_loss_type: [sigmoid, sft] and dpo_loss_weights: [1.0, 0.2]"),
        ("overfitting", "Write: lora_r: 8"),
        ("learning_rate_below_precision", "Write: learning_rate: 0.0001"),
    ],
)
def test_advice_ends_with_the_line_to_write(name: str, text: str):
    assert run(*FAULTS[name]())[name].advice.endswith(text)


def test_a_longer_sequence_is_advised_from_the_audit():
    audit = {**AUDIT, "cut": 700, "sequence_len_for_95_percent": 3100}
    assert run([], FACTS, (audit,)) == {}
    assert run([{"step": 1}], FACTS, (audit,))["pairs_mostly_cut"].advice.endswith("Write: sequence_len: 3100")


def test_no_token_is_seen_from_the_lengths_too():
    found = run(*changed(lambda _: {"lengths/rejected": 0.2}, since=40))
    assert found["no_completion_tokens"].first_step == 40
    assert "rejected" in found["no_completion_tokens"].message


def test_displacement_of_chosen_alone_or_rejected_alone_is_none():
    one = run(*changed(lambda line: {"logps/chosen_displacement": -1.0, "logps/rejected_displacement": 0.1}))
    other = run(*changed(lambda line: {"logps/chosen_displacement": 0.1, "logps/rejected_displacement": -3.0}))
    assert one == other == {}


def test_a_single_overflow_under_fp16_is_nothing_and_two_are_a_finding():
    assert run(*changed(lambda line: {"grad_norm": math.inf if line["step"] == 7 else 1.0})) == {}
    assert set(run(*changed(lambda line: {"grad_norm": math.inf if line["step"] in (7, 9) else 1.0}))) == {"not_finite"}


def test_a_spike_of_the_gradient_is_nothing():
    assert run(*changed(lambda line: {"grad_norm": 500.0 if line["step"] % 40 == 0 else 2.0})) == {}


def test_a_reference_that_is_meant_to_move_is_no_drift():
    lines, facts, audits = FAULTS["reference_drift"]()
    assert run(lines, replace(facts, reference_fixed=False), audits) == {}


def test_another_loss_at_ln2_is_nothing():
    lines, _, _ = FAULTS["loss_at_ln2"]()
    assert "loss_at_ln2" not in run(lines, replace(FACTS, losses=("apo_zero",)))


def test_a_finding_is_new_once_and_keeps_its_first_and_last_step():
    monitor = HealthMonitor(CHECKS, History(FACTS))
    new = {}
    for line in changed(lambda _: {"grad_norm": 0.0}, since=50)[0]:
        for finding in monitor.add(line):
            new.setdefault(finding.check, []).append(line["step"])
    assert new == {"gradient_vanished": [54]}
    assert (monitor.findings["gradient_vanished"].first_step, monitor.findings["gradient_vanished"].last_step) == (
        50,
        200,
    )


@pytest.mark.parametrize("answer", ["raise", "text"])
def test_a_failing_check_is_a_finding_that_names_its_owner_and_is_not_run_again(answer: str):
    calls = []

    def theirs(history: History) -> Any:
        calls.append(history.step)
        if answer == "raise":
            raise KeyError("rewards/mine")
        return "fine"

    monitor = HealthMonitor({"theirs": theirs}, History(FACTS), {"theirs": "their-package"}.__getitem__)
    for line in healthy_lines(20):
        monitor.add(line)
    assert calls == [1]
    assert set(monitor.findings) == {"theirs"}
    what = monitor.findings["theirs"].message
    assert "'theirs' of their-package" in what
    assert ("KeyError: 'rewards/mine'" if answer == "raise" else "returned str") in what


def test_a_replay_finds_what_the_monitor_found():
    for name, fault in FAULTS.items():
        lines, facts, audits = fault()
        assert name in {found.check for found in replay(CHECKS, History(facts, audits), list(lines))}


def test_errors_come_first_in_a_replay():
    lines, facts, audits = changed(lambda _: {"loss": math.nan, "rewards/saturated": 1.0}, since=20)
    assert [found.severity for found in replay(CHECKS, History(facts, audits), lines)] == ["error", "warning"]


def test_findings_and_facts_survive_json():
    finding = run(*FAULTS["overfitting"]())["overfitting"]
    assert Finding.from_dict({**json.loads(json.dumps(asdict(finding))), "unknown": 1}) == finding
    facts = RunFacts.from_dict({**json.loads(json.dumps(asdict(FACTS))), "unknown": 1})
    assert replace(facts, losses=tuple(facts.losses)) == FACTS


def test_the_text_of_a_finding_says_all():
    text = run(*FAULTS["saturated_pairs"]())["saturated_pairs"].text()
    assert text.startswith("health: saturated_pairs (warning, since step ")
    assert text.endswith("Write: learning_rate: 5e-06")


def test_the_checks_come_through_the_hook():
    assert {name: get_registry().health_checks[name] for name in CHECKS} == CHECKS


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_is_explained_in_the_documentation(name: str):
    text = (ROOT / "docs/health.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    check = CHECKS[name]
    assert f"| {check.severity} |" in row
    assert f"| {check.threshold:g} |" in row
    assert f"| {check.window or '–'} |" in row
    assert f"| {check.source} |" in row


def test_the_check_in_the_documentation_works():
    text = (ROOT / "docs/health.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(text.split("```python")[1].split("```")[0], names)
    monitor = HealthMonitor(names["dpo_health_checks"](), History(FACTS))
    for line in changed(lambda _: {"rewards/margins": -0.25}, since=30)[0]:
        monitor.add(line)
    assert monitor.findings["chosen_below_rejected"].first_step == 30
