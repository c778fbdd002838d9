"""What is logged arrives in the trackers that the host sets up."""

import json
import struct

import pytest

from tests.integration.test_health_runs import config
from tests.support import host

FIELDS = [
    "rewards/margins", "rewards/margins_p50", "entropy/chosen", "lengths/chosen", "logps/chosen_displacement",
    "speed/pairs_per_second", "rewards/count",
]  # fmt: skip


def test_tensorboard_holds_every_field(base_dir, sft_dir, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = host.train(config(base_dir, sft_dir, tmp_path, use_tensorboard=True, max_steps=2), tmp_path)
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    for field in FIELDS:
        values = [event.value for event in events.Scalars(f"train/{field}")]
        assert values == pytest.approx([line[field] for line in run.lines], rel=1e-4, abs=1e-6)


def log_records(data):
    """Records of a file in LevelDB's log format: blocks of 32 KiB, a header of checksum, length and part in front of each."""
    at, parts = 7, b""  # wandb's own header
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, part = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_offline_wandb_holds_every_field(base_dir, sft_dir, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")  # else it keeps stdout after its end, and logs an error for each line
    settings = {"use_wandb": True, "wandb_project": "test", "wandb_mode": "offline", "max_steps": 2}
    run = host.train(config(base_dir, sft_dir, tmp_path, **settings), tmp_path)
    wandb.teardown()  # ends its writing process too: after finish() alone, the last block may not be in the file yet
    (file,) = tmp_path.rglob("*.wandb")
    found = {}
    for content in log_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        for item in record.history.item:
            found.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    assert found, f"no history in {file.stat().st_size} bytes"
    for field in FIELDS:
        assert found[f"train/{field}"] == pytest.approx([line[field] for line in run.lines], rel=1e-4, abs=1e-6)
