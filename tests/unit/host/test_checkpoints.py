"""Which checkpoint a run resumes from, and a sample of damaged ones."""

import json
import shutil
from dataclasses import replace

import pytest

from dpo_plugin.errors import AdapterError, CheckpointError
from dpo_plugin.host.output_dir.checkpoints import checkpoint_to_resume, file_digests, read_marker, write_marker
from dpo_plugin.model.adapter_config import AdapterFolder
from tests.fuzz.checkpoints import Bench, cases


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def output(bench, tmp_path):
    """An output folder with checkpoint-2 and checkpoint-4."""
    return shutil.copytree(bench.output, tmp_path / "output")


def newest(output, origin):
    return checkpoint_to_resume(True, False, output, origin)


@pytest.mark.parametrize("case", list(cases(seed=0, count=110)), ids=str)
def test_what_is_damaged_is_never_used_wrong_and_never_ends_bare(bench, case):
    bench.check(case)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"])
@pytest.mark.parametrize("half", [True, False], ids=["half", "missing"])
def test_an_older_whole_checkpoint_is_taken_instead(bench, output, name, half):
    assert newest(output, bench.origin) == str(output / "checkpoint-4")
    file = output / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]) if half else file.unlink()
    assert newest(output, bench.origin) == str(output / "checkpoint-2")
    with pytest.raises(CheckpointError, match=rf"{name} is {'changed' if half else 'missing'}\. Write: resume_from"):
        checkpoint_to_resume(str(file.parent), True, output, bench.origin)


def test_a_checkpoint_whose_digests_were_not_written_is_passed_over(bench, output):
    write_marker(output / "checkpoint-4", bench.origin)  # as a killed run leaves it
    assert newest(output, bench.origin) == str(output / "checkpoint-2")


@pytest.mark.parametrize("steps", [(4,), (2, 4)])
def test_a_checkpoint_without_optimizer_is_not_gone_on_with(bench, output, steps):
    for step in steps:
        folder = output / f"checkpoint-{step}"
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).unlink()
        write_marker(folder, bench.origin, file_digests(folder))
    with pytest.raises(CheckpointError, match="holds no optimizer"):
        checkpoint_to_resume(str(output / "checkpoint-4"), True, output, bench.origin)
    if len(steps) == 1:
        assert newest(output, bench.origin) == str(output / "checkpoint-2")
    else:
        with pytest.raises(CheckpointError, match=r"holds no optimizer.*lora_model_dir: .*checkpoint-4"):
            newest(output, bench.origin)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "c" * 64}, "base model bbbbbbbbbbbb, and this run has cccccccccccc"),
        ({"reference": {"strategy": "adapter", "identity": "sha256:0"}}, "and this run has adapter sha256:0"),
        ({"lora_alpha": 36}, "has `lora_alpha: 8`, and this run `lora_alpha: 36`.*Write: lora_alpha: 8"),
        ({"r": 8}, "has `r: 4`.*Write: lora_r: 4"),
        ({"lora_target_modules": ["q_proj"]}, "`lora_target_modules"),
    ],
)
@pytest.mark.parametrize("named", [True, False], ids=["named", "newest"])
def test_what_was_trained_with_something_else_is_refused(bench, output, change, message, named):
    facts = {name: change.get(name, value) for name, value in bench.origin.adapter.items()}
    other = replace(bench.origin, adapter=facts, **{k: v for k, v in change.items() if k in ("base", "reference")})
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint_to_resume(str(output / "checkpoint-4") if named else True, named, output, other)
    assert len(str(error.value)) < 500


def test_the_marker_says_what_a_folder_was_trained_with(bench, output):
    marker = read_marker(output / "checkpoint-4")
    assert marker["reference"] == bench.origin.reference
    assert marker["base"] == bench.origin.base
    assert {"optimizer.pt", "adapter_config.json"} < marker["files"].keys()
    assert not [file for file in (output / "checkpoint-4").iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": "x"}, "`lora_alpha` cannot be 'x'"),
        ({"lora_alpha": float("nan")}, "`lora_alpha` cannot be 'nan'"),
        ({"r": True}, "`r` cannot be 'True'"),
        ({"use_rslorb": True, "use_rslora": None}, "has `use_rslorb` where PEFT writes `use_rslora`"),
        ({"alpha_pattern": {"q_proj": "x"}}, "`alpha_pattern.q_proj` cannot be 'x'"),
        ({"lora_alpha": None}, "`lora_alpha` cannot be"),
    ],
)
def test_an_adapter_config_that_peft_would_misread_is_refused(bench, tmp_path, change, message):
    folder = shutil.copytree(bench.adapter, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    content = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None or k not in change}))
    with pytest.raises(AdapterError, match=f"{message}.*Save the adapter again"):
        AdapterFolder.open(folder, "lora_model_dir")
