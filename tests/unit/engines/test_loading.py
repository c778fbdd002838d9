"""When a 4-bit base is loaded in parts, and how two ranks, of one node or of two, come to one copy of it."""

import sys
import textwrap

import pytest

from dpo_plugin.engines.config import EngineSettings
from dpo_plugin.engines.loading import Loading
from dpo_plugin.errors import ConfigError
from tests.support import forked

FSDP2 = {"fsdp_version": 2, "fsdp_config": {"offload_params": False}}
ZERO3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}
QLORA = {"adapter": "qlora", "load_in_4bit": True}

RANK = """
import json, os, sys
from pathlib import Path
import torch.distributed as dist
from dpo_plugin.engines.loading import make_on_each_node
from dpo_plugin.model import quantised_copy as copies

rank, nodes, disks, behaviour, root = sys.argv[1:]
os.environ |= {"RANK": rank, "LOCAL_RANK": "0" if nodes == "2" else rank}
os.environ["LOCAL_WORLD_SIZE"] = "1" if nodes == "2" else "2"
dist.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=int(rank), world_size=2)
folder = Path(root) / (f"disk{rank}" if disks == "2" else "disk") / "copy"


def make():
    with (Path(root) / "made").open("a") as file:
        file.write(rank)
    if behaviour == "fails":
        raise ValueError("the GPU is gone")
    folder.mkdir(parents=True)
    for name in ("a", "b", "c"):
        (folder / name).write_text(name + (rank if behaviour == "differs" else ""))
    files = {file.name: [file.stat().st_size, copies._digest(file)] for file in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    if behaviour == "bad disk" or (behaviour == "damaged" and len((Path(root) / "made").read_text()) == 1):
        (folder / "b").write_text("?")


make_on_each_node(folder, make, print)
print("there", copies.is_there(folder), copies.damage(folder), flush=True)
"""


def run(tmp_path, behaviour="", nodes=1, disks=1):
    """Output and errors of both ranks, and who has made a copy."""
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(RANK))
    arguments = [str(nodes), str(disks), behaviour, str(tmp_path)]
    command = [sys.executable, str(script)]
    ranks = [forked.start([*command, str(n), *arguments]) for n in range(2)]
    found = [rank.end(timeout=120) for rank in ranks]
    return [(rank.stdout, rank.stderr) for rank in found], (tmp_path / "made").read_text()


@pytest.mark.parametrize(("nodes", "disks", "makers"), [(1, 1, "0"), (2, 1, "0"), (2, 2, "01")])
def test_one_rank_makes_the_copy_or_one_of_each_node_that_does_not_see_it(nodes, disks, makers, tmp_path):
    found, made = run(tmp_path, nodes=nodes, disks=disks)
    assert made == makers
    assert [said for said, _ in found] == ["there True None\n"] * 2


def test_a_damaged_copy_is_made_once_more(tmp_path):
    found, made = run(tmp_path, "damaged")
    assert made == "00"
    assert all("there True None" in said for said, _ in found)
    assert "is damaged, b has other bytes; the base is quantised again" in found[0][0]


def test_a_disk_that_damages_every_copy_is_given_up(tmp_path):
    found, made = run(tmp_path, "bad disk")
    assert made == "00"
    assert all("is damaged again: b has other bytes" in complained for _, complained in found)


def test_all_ranks_stop_where_one_fails(tmp_path):
    found, made = run(tmp_path, "fails")
    assert made == "0"
    assert "ValueError: the GPU is gone" in found[0][1]
    assert "ConfigError: the GPU is gone" in found[1][1]


def test_nodes_with_different_copies_stop(tmp_path):
    found, made = run(tmp_path, "differs", nodes=2, disks=2)
    assert sorted(made) == ["0", "1"]
    assert all("RankMismatchError" in complained for _, complained in found)
    assert all("the base's copy in 4 bits is" in complained for _, complained in found)


def choose(wanted, **cfg):
    return Loading.choose(wanted, cfg, EngineSettings.read(cfg))


@pytest.mark.parametrize("engine", [FSDP2, ZERO3])
def test_four_bits_on_an_engine_that_shards_are_loaded_in_parts(engine):
    assert choose(None, **QLORA, **engine).sharded
    assert choose("sharded", **QLORA, **engine).asked
    assert not choose("host", **QLORA, **engine).sharded


@pytest.mark.parametrize(
    ("cfg", "why"),
    [
        (QLORA, "DDP keeps the whole base on each GPU"),
        ({**QLORA, "deepspeed": {"zero_optimization": {"stage": 2}}}, "ZeRO-2 keeps the whole base"),
        ({"adapter": "lora", **FSDP2}, "only a base in 4 bits"),
        ({**QLORA, **FSDP2, "quantize_moe_experts": True}, "`quantize_moe_experts: true`: experts are quantised by"),
        ({**QLORA, **ZERO3, "trust_remote_code": True}, "`trust_remote_code: true`: the model's code"),
        ({**QLORA, **FSDP2, "reinit_weights": True}, "`reinit_weights: true`"),
        ({**QLORA, **FSDP2, "nf4_backend": "torchao"}, "`nf4_backend: torchao`"),
        ({**QLORA, **FSDP2, "qlora_sharded_model_loading": True}, "`qlora_sharded_model_loading: true`"),
    ],
)
def test_what_cannot_be_is_left_to_the_host_or_refused_if_it_was_asked_for(cfg, why):
    assert choose(None, **cfg).blocker.startswith(why)
    with pytest.raises(ConfigError, match=r"Write: loading: host$") as error:
        choose("sharded", **cfg)
    assert why in str(error.value)
