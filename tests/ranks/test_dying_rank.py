"""A rank that is killed in the middle of a step ends the run, and the next run goes on from the last whole checkpoint."""

import time

import pytest

from tests.ranks.shipped import STEPS, config, curve
from tests.support.cpu_ranks import launch, torchrun
from tests.support.dying_rank import time_of_death

DYING = "tests.support.dying_rank.DyingRank"


@pytest.mark.parametrize(("name", "command"), [("zero3-nf4", torchrun), ("fsdp2-nf4", None)])
def test_a_killed_rank_ends_the_run_and_the_next_one_goes_on(name, command, base_dir, sft, alone, tmp_path):
    settings = config(name, base_dir, sft, tmp_path, save_steps=3, auto_resume_from_checkpoints=True)
    dying = launch(settings, tmp_path, more_plugins=(DYING,), command=command, DIE_AT_STEP="5")
    ended_after = time.time() - float(time_of_death(dying.output_dir).read_text())
    print(f"\n{name}: the run ended {ended_after:.1f} s after its rank, with code {dying.returncode}")
    assert dying.returncode != 0
    assert ended_after < 60
    torn = dying.output_dir / "checkpoint-4"  # what a death in the middle of a save leaves
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"half")

    resumed = launch(settings, tmp_path)
    assert resumed.returncode == 0, resumed.error()
    assert [line["step"] for line in resumed.lines] == list(range(1, STEPS + 1))
    assert "checkpoint-4 is incomplete" in resumed.output
    assert (curve(resumed.lines) - curve(alone(name).lines)).abs().max() <= 2e-3
