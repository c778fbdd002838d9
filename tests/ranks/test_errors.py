"""What a user sees of a config error on two ranks: torchrun's own message, which ends with ours, said once."""

from tests.ranks.shipped import config
from tests.support.cpu_ranks import launch, torchrun


def test_both_ranks_refuse_a_config(base_dir, sft, tmp_path):
    run = launch(config("ddp-nf4", base_dir, sft, tmp_path, rl_beta=-1), tmp_path, command=torchrun)
    assert run.returncode == 1
    lines = [line for line in run.output.splitlines() if line.strip()]
    assert lines[-2] == "  traceback : dpo_plugin: `rl_beta: -1` must be above 0. Write: rl_beta: 0.1"
    assert set(lines[-1]) == {"="}
    assert sum("must be above 0" in line for line in lines) == 1
    assert sum(line.startswith("Traceback") for line in lines) == 1, "the launcher's own"
