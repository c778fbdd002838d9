"""torchrun, other launchers, and two nodes start the same recipe and print the same curve."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.ranks.shipped import config, curve
from tests.support.cpu_ranks import (
    PLUGINS,
    RankRun,
    clean_environment,
    free_port,
    launch,
    run_group,
    tool,
    torchrun,
    write_config,
)
from tests.support.tiny import ROOT

STEPS = 2


def accelerate(file, ranks):
    """As the head of recipes/qwen72b-dpo-fsdp.yaml says."""
    engine = ["--config_file", str(ROOT / "fsdp_configs/fsdp2_qlora.yaml")]
    ranks = ["--num_processes", str(ranks), "--main_process_port", str(free_port())]
    return [tool("accelerate"), "launch", *engine, *ranks, "-m", "axolotl.cli.train", str(file)]


def deepspeed(file, ranks):
    ranks = ["--num_gpus", str(ranks), "--master_port", str(free_port())]
    return [tool("deepspeed"), *ranks, "--module", "axolotl.cli.train", str(file)]


def short(name, base_dir, sft, folder):
    without = {"eval_strategy": "no", "eval_steps": None, "save_strategy": "no", "save_steps": None}
    return config(name, base_dir, sft, folder, max_steps=STEPS, **without)


def assert_same_curve(run, alone, name):
    assert run.returncode == 0, run.error()
    assert len(run.lines) == STEPS
    assert (curve(run.lines) - curve(alone(name).lines[:STEPS])).abs().max() <= 2e-3


@pytest.mark.parametrize(
    ("launcher", "name"),
    [(torchrun, "zero3-nf4"), (accelerate, "fsdp2-nf4"), (deepspeed, "zero3-nf4")],
)
def test_launcher(launcher, name, base_dir, sft, alone, tmp_path):
    run = launch(short(name, base_dir, sft, tmp_path), tmp_path, command=launcher)
    assert_same_curve(run, alone, name)


@pytest.mark.parametrize("name", ["zero3-nf4", "fsdp2-nf4"])
def test_two_nodes(name, base_dir, sft, alone, tmp_path):
    """Two torchrun agents that meet on one port; each is the first of its node, and prepares the data for it."""
    settings = short(name, base_dir, sft, tmp_path)
    file = write_config({**settings, "plugins": PLUGINS}, tmp_path)
    meeting = ["--rdzv_id", "dpo", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    launcher = ["--launcher", "torchrun", "--", "--nnodes", "2", "--nproc_per_node", "1", *meeting]
    command = [tool("axolotl"), "train", str(file), *launcher]
    with ThreadPoolExecutor() as pool:
        agents = [pool.submit(run_group, command, clean_environment("deepspeed" in settings), 300) for _ in range(2)]
        ended = [agent.result() for agent in agents]
    for code, output in ended:
        assert_same_curve(RankRun(tmp_path / "out", code, output), alone, name)
