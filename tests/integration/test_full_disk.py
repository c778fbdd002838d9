"""A disk that is full: what only tells of a run may be lost, what the run is for may not."""

import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from dpo_plugin.errors import CheckpointError
from dpo_plugin.host.log import may_fail
from dpo_plugin.host.output_dir.lock import LOCK
from dpo_plugin.host.output_dir.resume import saving
from tests.support import host
from tests.support.tiny import dpo_config

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_training_goes_on_without_its_log_and_ends_where_it_cannot_save(base_dir, sft_dir, tmp_path):
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    for name in ("dpo_log.jsonl", "dpo_run.json"):
        (output_dir / name).symlink_to("/dev/full")
    (output_dir / "checkpoint-2").mkdir()
    (output_dir / "checkpoint-2" / "optimizer.pt").symlink_to("/dev/full")
    settings = {"lora_model_dir": str(sft_dir), "max_steps": 2, "save_steps": 2}
    with pytest.raises(CheckpointError, match=r"cannot be written at step 2: .*write:"):
        host.train(dpo_config(base_dir, output_dir, **settings), tmp_path)
    assert (output_dir / LOCK).is_file()


@pytest.mark.parametrize("error", [FULL, SafetensorError("I/O error: No space left on device")])
def test_a_save_that_fails_says_where_and_what_to_write(tmp_path, error):
    with (
        pytest.raises(CheckpointError, match=r"No space left on device.*output_dir: <a folder with room>\)$"),
        saving(tmp_path),
    ):
        raise error


def test_torch_saves_failure_is_told_from_others(tmp_path):
    with pytest.raises(CheckpointError), saving(tmp_path):
        torch.save({"a": torch.zeros(2**16)}, "/dev/full")
    with pytest.raises(RuntimeError, match="out of memory"), saving(tmp_path):
        raise RuntimeError("out of memory")


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, monkeypatch):
    from dpo_plugin.host import log

    said = []
    monkeypatch.setattr(log.LOG, "warning", said.append)
    for _ in range(2):
        with may_fail(tmp_path / "log"):
            raise FULL
    assert len(said) == 1
    assert "training goes on" in said[0]
