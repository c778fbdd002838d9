"""A 4-bit base that two ranks map from a copy on disk: the weights, losses and adapter of the host's own loading."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.ranks.shipped import config
from tests.support import tiny
from tests.support.cpu_ranks import launch, records
from tests.support.opened import opened_in

STEPS = 2
ENGINES = ("zero3-nf4", "fsdp2-nf4")
RECORD = ("tests.support.loaded_base.LoadedBase",)


def start(name, base_dir, sft, folder, prepared, loading, **settings):
    section = {"loading": loading, "reference": {"cache": False}}
    steps = {"max_steps": STEPS, "save_steps": STEPS // 2, "eval_strategy": "no", "eval_steps": None}
    cfg = config(name, base_dir, sft, folder, **steps, **settings)
    return launch({**cfg, "dpo_plugin": section, "dataset_prepared_path": str(prepared)}, folder, more_plugins=RECORD)


def loaded(run):
    return [json.loads((records(run.output_dir) / f"loaded-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module", params=ENGINES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def started(name, base_dir, sft, tmp_path_factory):
    """The host's way, a first start that makes the copy, and a second that finds it."""
    folder = tmp_path_factory.mktemp(name)
    found, opened = {}, {}
    for kind, loading in (("host", "host"), ("first", None), ("second", "sharded")):
        with opened_in(base_dir) as opened[kind]:
            found[kind] = start(name, base_dir, sft, folder / kind, folder / f"prepared-{loading == 'host'}", loading)
        assert found[kind].returncode == 0, found[kind].error()
    return found, opened


@pytest.fixture(scope="module")
def runs(started):
    return started[0]


def test_every_tensor_is_what_the_host_would_have_loaded(runs, base_dir):
    expected = loaded(runs["host"])
    assert len(expected[0]["four_bit"]) > 4
    assert not expected[0]["mapped"]
    for kind in ("first", "second"):
        for ours, theirs in zip(loaded(runs[kind]), expected, strict=True):
            assert ours["mapped"]
            assert ours["digests"] == theirs["digests"]
            assert ours["name"] == theirs["name"] == str(base_dir)


def test_losses_and_adapter_are_equal_to_the_last_bit(runs):
    host = runs["host"]
    assert len(host.lines) == STEPS
    for kind in ("first", "second"):
        for field in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert [line[field] for line in runs[kind].lines] == [line[field] for line in host.lines], field
        ours, theirs = (load_file(run.output_dir / "adapter_model.safetensors") for run in (runs[kind], host))
        assert all((ours[key] == theirs[key]).all() for key in theirs)
        assert ours.keys() == theirs.keys()


def test_a_second_start_reads_no_weights_in_full(started):
    _, opened = started
    assert "config.json" in opened["second"]
    assert "model.safetensors" in opened["first"]
    assert "model.safetensors" in opened["host"]
    assert not [file for file in opened["second"] if file.endswith(".safetensors")]


def test_the_log_says_how_the_base_is_loaded_and_what_it_takes(runs):
    assert "each GPU holds the whole base in 4 bits before it is sharded, because `dpo_plugin.loading: host`" in (
        " ".join(runs["host"].output.split())
    )
    said = " ".join(runs["first"].output.split())
    assert said.count("the base is quantised once, into ") == 1
    assert said.count("the base is loaded layer by layer from its copy in 4 bits") == 1
    assert "GiB meanwhile" in said
    assert "quantised once" not in runs["second"].output


def test_a_run_of_the_hosts_way_goes_on_with_the_copy(name, runs, base_dir, sft, tmp_path):
    host = runs["host"]
    checkpoint = {"resume_from_checkpoint": str(host.output_dir / f"checkpoint-{STEPS // 2}")}
    prepared = host.output_dir.parents[1] / "prepared-False"
    run = start(name, base_dir, sft, tmp_path, prepared, "sharded", **checkpoint)
    assert run.returncode == 0, run.error()
    assert [line["loss"] for line in run.lines] == [line["loss"] for line in host.lines]
    ours, theirs = (load_file(one.output_dir / "adapter_model.safetensors") for one in (run, host))
    assert all((ours[key] == theirs[key]).all() for key in theirs)


def test_a_base_that_is_stored_in_4_bits_is_mapped_as_it_is(name, runs, base_dir, sft, tmp_path):
    stored = tmp_path / "stored"
    model = AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=tiny.NF4, dtype=torch.bfloat16)
    model.save_pretrained(stored)
    tiny.tokenizer().save_pretrained(stored)
    run = start(name, stored, sft, tmp_path, tmp_path / "prepared", "sharded")
    assert run.returncode == 0, run.error()
    assert not (tmp_path / "prepared" / "bases").exists()
    assert loaded(run)[1]["digests"] == loaded(runs["host"])[1]["digests"]
    assert [line["loss"] for line in run.lines] == [line["loss"] for line in runs["host"].lines]
