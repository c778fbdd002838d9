"""The shipped 72B recipes on two real gloo ranks: one curve with one process, checkpoints, and what is saved.

Base model, data and sizes are those of the tiny model; engine, precision and adapters are the recipes'.
"""

import json
import math

import pytest
import torch
from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights
from transformers import AutoModelForCausalLM

from tests.ranks.shipped import ENGINES, STEPS, config, curve
from tests.support.cpu_ranks import launch

PACKS = {"compute": {"max_tokens": 420}}


CORE = ("zero3-nf4", "fsdp2-nf4")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.core if name in CORE else ()) for name in ENGINES]
)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def run(name, base_dir, sft, tmp_path_factory):
    folder = tmp_path_factory.mktemp(name)
    done = launch(config(name, base_dir, sft, folder), folder)
    assert done.returncode == 0, done.error()
    return done


def test_two_ranks_print_the_curve_of_one_process(name, run, alone):
    assert run.lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert run.lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    expected = curve(alone(name).lines)
    assert len(expected) == STEPS
    assert expected[-1, 1] > 0.02, "the policy must have moved for the curve to mean something"
    difference = (curve(run.lines) - expected).abs().amax(0)
    print(f"\n{name}: max difference of loss {difference[0]:.1e}, of margin {difference[1]:.1e}")
    assert difference.max() <= 2e-3


def test_figures_by_source_and_evaluation_are_those_of_one_process(name, run, alone):
    found, expected = run.evaluations[-1], alone(name).evaluations[-1]
    names = [field for field in expected if field.startswith("eval_rewards/")]
    assert len([field for field in names if "/count/" in field]) >= 3
    for field in names:
        assert found[field] == pytest.approx(expected[field], abs=2e-2 if "accuracies" in field else 4e-3), field
    for line, of_one in zip(run.lines, alone(name).lines, strict=True):
        counts = {field: value for field, value in of_one.items() if field.startswith("rewards/count")}
        assert {field: line.get(field) for field in counts} == counts


def test_the_adapters_travel_is_that_of_one_process(name, run, alone):
    for field in ("adapter/distance", "adapter/update_norm"):
        assert [line[field] for line in run.lines] == pytest.approx(
            [line[field] for line in alone(name).lines], rel=0.05
        )


def test_what_the_optimizer_updates_is_fp32_and_moves(name, run):
    left = json.loads((run.output_dir / "dpo_run.json").read_text())
    assert left["facts"]["adapter_dtype"] == "float32"
    assert left["facts"]["trainable_share"] > 0.01
    assert run.lines[-1]["weights/changed"] > 0.95
    assert "learning_rate_below_precision" not in {finding["check"] for finding in left["findings"]}


def test_what_is_saved_is_the_policy_adapter_with_pefts_keys(name, run, base_dir, sft):
    saved = load_peft_weights(str(run.output_dir), device="cpu")
    start = load_peft_weights(str(sft), device="cpu")
    assert {key: value.shape for key, value in saved.items()} == {key: value.shape for key, value in start.items()}
    assert any(not torch.equal(saved[key].float(), start[key].float()) for key in saved)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), run.output_dir)
    loaded = {key: value for key, value in model.state_dict().items() if ".lora_" in key}
    assert len(loaded) == len(saved)
    for key, value in saved.items():
        assert torch.equal(loaded[key.replace(".weight", ".default.weight")], value.to(torch.float32))
    assert not list(run.output_dir.rglob("model*.safetensors")) + list(run.output_dir.rglob("pytorch_model*"))


def test_a_resumed_run_in_packs_with_a_kept_reference_goes_on_along_the_curve(
    name, run, alone, base_dir, sft, tmp_path
):
    checkpoint = run.output_dir / f"checkpoint-{STEPS // 2}"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == STEPS // 2
    section = {**PACKS, "reference": {"cache": str(tmp_path / "kept")}}
    settings = {
        "resume_from_checkpoint": str(checkpoint),
        "dpo_plugin": section,
        "save_strategy": "no",
        "save_steps": None,
    }
    resumed = launch(config(name, base_dir, sft, tmp_path, **settings), tmp_path)
    assert resumed.returncode == 0, resumed.error()
    assert [line["step"] for line in resumed.lines] == list(range(1, STEPS + 1))
    difference = (curve(resumed.lines) - curve(alone(name).lines)).abs().max()
    print(f"\n{name}: max difference after resume in packs {difference:.1e}")
    assert difference <= 2e-3
    assert list((tmp_path / "kept").rglob("*.logps"))


def test_no_warning_comes_with_every_step(run):
    assert run.output.count("None of the inputs have requires_grad") == 0
    assert run.output.count("FutureWarning") == 0
