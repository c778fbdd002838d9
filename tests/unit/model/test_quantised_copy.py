"""A copy of a base in 4 bits: its tensors are those that transformers quantises, and a copy that is not whole is found."""

import errno
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, modeling_utils

from dpo_plugin.errors import ConfigError
from dpo_plugin.model import quantising
from dpo_plugin.model.quantised_copy import (
    damage,
    discard,
    folder_of,
    identity,
    is_there,
    weight_files,
    write,
)
from dpo_plugin.model.quantising import staying_on_host
from tests.support import architectures, forked, tiny

KINDS = ("llama", "qwen3_moe", "gemma3_text", "granite", "phi3", "gpt_oss", "cohere2")
"""Of which experts are fused as they are read, weights are tied, and layers are stored fused."""


def load(base):
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=tiny.NF4, dtype=torch.bfloat16)


def made_of(base):
    return {**identity(weight_files(str(base)), quantisation=tiny.NF4.to_dict()), "base": str(base)}


def copy_of(base, root):
    facts = made_of(base)
    folder = folder_of(root, str(base), facts)
    write(folder, lambda: load(base), facts, 1)
    return folder


def tensors(model):
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in list(found.items()):
        if (state := getattr(value, "quant_state", None)) is not None:
            found |= {f"{name}.{key}": one for key, one in state.as_dict(packed=True).items()}
    return found


@pytest.fixture(scope="module")
def copy(base_dir, tmp_path_factory):
    return copy_of(base_dir, tmp_path_factory.mktemp("bases"))


@pytest.fixture
def own(copy, tmp_path):
    """A copy that may be spoilt."""
    return shutil.copytree(copy, tmp_path / copy.name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_mapped_is_what_transformers_quantises(kind, tmp_path):
    base, root = tmp_path / "base", tmp_path / "bases"
    architectures.make_model(kind, torch.bfloat16).save_pretrained(base)
    folder = copy_of(base, root)
    with staying_on_host():
        mapped, host = load(folder), load(base)
    expected, found = tensors(host), tensors(mapped)
    assert sum("quant_state" in name for name in expected) >= 2, "nothing is in 4 bits"
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (found[name], value))), name
    ids = torch.arange(12)[None]
    assert torch.equal(mapped(ids).logits, host(ids).logits)


def test_a_weight_stays_in_the_files_pages(copy):
    with staying_on_host():
        model = load(copy)
    packed = next(value for name, value in tensors(model).items() if hasattr(value, "quant_state"))
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    mapped = [line.split() for line in maps if str(copy) in line]
    ranges = [[int(part, 16) for part in line[0].split("-")] for line in mapped]
    assert any(start <= packed.data_ptr() < end for start, end in ranges)


def test_no_memory_is_reserved_for_a_model_that_is_not_kept(base_dir, tmp_path, monkeypatch):
    reserved = []

    def warm_up(model, _, quantizer):
        on_gpu = {name: torch.device("cuda", 0) for name, _ in model.named_parameters()}
        reserved.append(sum(modeling_utils.get_total_byte_count(model, on_gpu, quantizer).values()))

    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", warm_up)
    load(base_dir)
    copy_of(base_dir, tmp_path)
    assert reserved[0] > 0
    assert reserved[1] == 0


def test_a_second_start_finds_it_and_a_changed_base_does_not(base_dir, tmp_path):
    base = shutil.copytree(base_dir, tmp_path / "base")
    folder = copy_of(base, tmp_path / "bases")
    assert is_there(folder)
    assert damage(folder) is None
    assert folder_of(tmp_path / "bases", str(base), made_of(base)) == folder
    weights = base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert folder_of(tmp_path / "bases", str(base), made_of(base)) != folder


@pytest.mark.parametrize("spoil", ["flip", "cut", "remove", "{", "3", '{"files": []}', '{"files": {"a": 3}}'])
def test_damage_is_found_and_made_good(spoil, own, base_dir):
    file = sorted(own.glob("*.safetensors"))[-1]
    data = bytearray(file.read_bytes())
    if spoil == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif spoil == "cut":
        file.write_bytes(data[:-8])
    elif spoil == "remove":
        file.unlink()
    else:
        (own / "manifest.json").write_text(spoil)
    assert damage(own)
    discard(own)
    assert not is_there(own)
    write(own, lambda: load(base_dir), made_of(base_dir), 1)
    assert damage(own) is None


def test_files_are_divided_among_processes(own):
    (own / "config.json").write_bytes((own / "config.json").read_bytes().replace(b"l", b"L"))
    found = [damage(own, part, 3) for part in range(3)]
    assert [bool(why) for why in found].count(True) == 1


def test_a_full_disk_says_how_much_it_takes_and_leaves_nothing(base_dir, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(quantising, "save_file", full)
    folder = tmp_path / "bases" / "copy"
    with pytest.raises(ConfigError, match=r"bases cannot take .* 3\.0 GiB: .*No space left.*loading: host}\)$"):
        write(folder, lambda: load(base_dir), made_of(base_dir), 3 * 2**30)
    assert list((tmp_path / "bases").iterdir()) == []


def test_too_little_space_is_said_before_anything_is_read(tmp_path):
    folder = tmp_path / "bases" / "copy"
    with pytest.raises(ConfigError, match=r"1048576\.0 GiB: [\d.]+ GiB are free\. Make room, or write"):
        write(folder, lambda: pytest.fail("the base is read"), {}, 2**50)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "bases").write_text("a file")
    with pytest.raises(ConfigError, match=r"bases cannot take .*Write|write: dataset_prepared_path"):
        write(tmp_path / "bases" / "copy", lambda: pytest.fail("the base is read"), {}, 1)


def test_of_two_runs_at_once_the_first_copy_stays(base_dir, copy, tmp_path):
    facts = made_of(base_dir)
    folder = tmp_path / copy.name

    def meanwhile():
        shutil.copytree(copy, folder)
        return load(base_dir)

    write(folder, meanwhile, facts, 1)
    inode = folder.stat().st_ino
    write(folder, lambda: load(base_dir), facts, 1)
    assert folder.stat().st_ino == inode
    assert damage(folder) is None
    assert [one.name for one in tmp_path.iterdir()] == [copy.name]


def test_a_process_that_is_killed_leaves_no_copy_and_its_part_is_removed(base_dir, tmp_path):
    folder = tmp_path / "bases" / "copy"
    program = (
        "import os, signal; from dpo_plugin.model import quantised_copy as c, quantising as q; from tests.unit.model import "
        "test_quantised_copy as t; save = q.save_file\n"
        "def kill(*a, **k): save(*a, **k); os.kill(os.getpid(), signal.SIGKILL)\n"
        "q.save_file = kill; from pathlib import Path\n"
        f"c.write(Path({str(folder)!r}), lambda: t.load({str(base_dir)!r}), t.made_of({str(base_dir)!r}), 1)"
    )
    done = forked.run([sys.executable, "-c", program])
    assert done.returncode == -signal.SIGKILL, done.stderr[-1000:]
    left = list(folder.parent.iterdir())
    assert len(left) == 1
    assert list(left[0].glob("*.safetensors"))
    assert not is_there(folder)
    write(folder, lambda: load(base_dir), made_of(base_dir), 1)
    assert list(folder.parent.iterdir()) == [folder]


def test_a_checkpoint_that_lacks_weights_is_not_copied(base_dir, tmp_path):
    base = shutil.copytree(base_dir, tmp_path / "base")
    kept = load_file(base / "model.safetensors")
    lost = next(name for name in kept if "down_proj" in name)
    save_file({name: value for name, value in kept.items() if name != lost}, base / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"lacks 1 of its weights, the first is {lost}.*loading: host}}$"):
        copy_of(base, tmp_path / "bases")


def test_a_base_that_cannot_be_read_is_not_taken_for_a_full_disk(base_dir, tmp_path):
    base = shutil.copytree(base_dir, tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(SafetensorError, match="header"):
        copy_of(base, tmp_path / "bases")
    assert list((tmp_path / "bases").iterdir()) == []


def test_only_safetensors_are_weight_files(base_dir, tmp_path):
    assert [file.name for file in weight_files(str(base_dir))] == ["config.json", "model.safetensors"]
    AutoConfig.from_pretrained(base_dir).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert weight_files(str(tmp_path)) == []
    assert weight_files("nobody/has-this-model") == []
