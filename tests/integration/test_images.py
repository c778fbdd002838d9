"""Preference sets with images are refused, never trained on without them and without a word."""

import json

import pytest

from dpo_plugin.errors import ConfigError, DataError
from dpo_plugin.host.settings import read_settings
from dpo_plugin.host.yaml_keys import typed
from tests.support import host, tiny
from tests.support.tiny import ROOT, dpo_config

RUN = {"max_steps": 2, "save_strategy": "no", "save_steps": None}
PICTURE = {"bytes": "iVBORw0KGgo=", "path": None}


@pytest.fixture(scope="module")
def rows():
    lines = (ROOT / "recipes/data/preferences.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:40]]


def data(folder, rows):
    path = tiny.write_rows(folder / "rows.jsonl", rows)
    return {"datasets": [{"path": str(path), "ds_type": "json", "type": "dpo_plugin.chat"}]}


def answered(row, question):
    return {"prompt": question, "chosen": row["chosen"][-1]["content"], "rejected": row["rejected"][-1]["content"]}


def asked_with(part, key="content"):
    return [{"role": "user", key: [part, {"type": "text", "text": "What is it?"}]}]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda row: {**row, "images": [PICTURE]}, "`images` holds what is not text"),
        (lambda row: {**row, "image": "cat.png"}, "`image` holds what is not text"),
        (lambda row: {"image": PICTURE, **answered(row, "What is it?")}, "`image` holds what is not text"),
        (lambda row: answered(row, asked_with({"type": "image"})), "`prompt` has a message with a part of type image"),
        (
            lambda row: answered(row, asked_with({"type": "image_url", "image_url": {"url": "x"}}, "value")),
            "`prompt` has a message with a part of type image_url",
        ),
        (
            lambda row: {key: asked_with({"type": "image"}) + row[key][-1:] for key in ("chosen", "rejected")},
            "`chosen` has a message with a part of type image",
        ),
    ],
)
def test_a_set_with_images_is_refused(base_dir, rows, tmp_path, change, where):
    config = dpo_config(base_dir, tmp_path / "out", **RUN, **data(tmp_path, [change(row) for row in rows]))
    with pytest.raises(
        DataError,
        match=r"`datasets\[0\]` .*: 40 of 40 rows come with images, video or sound, and dpo_plugin trains on text alone. "
        f"row 1: {where}.*Write: path: <a preference set of text>$",
    ):
        host.train(config, tmp_path / "run")


def test_a_few_rows_with_images_are_counted_and_more_stop_the_run(base_dir, rows, tmp_path):
    """Columns of a table hold nulls for rows of text."""
    seen = [{**row, "images": [PICTURE] if number < 3 else [None], "image": None} for number, row in enumerate(rows)]
    run = host.train(dpo_config(base_dir, tmp_path / "out", **RUN, **data(tmp_path, seen)), tmp_path / "run")
    audit = json.loads((run.output_dir / "data_audit.json").read_text(encoding="utf-8"))["datasets"][0]
    assert audit["left_out"] == {"images, video or sound": 3}
    assert audit["kept"] == 37
    strict = dpo_config(base_dir, tmp_path / "out", dpo_plugin={"data": {"max_bad_rows": 0.05}}, **data(tmp_path, seen))
    with pytest.raises(DataError, match=r"3 of 40 rows come with images.*or max_bad_rows: 1.0 to train on the 37 rows"):
        host.train(strict, tmp_path / "again")


@pytest.mark.parametrize(("key", "value"), [("processor_type", "AutoProcessor"), ("is_multimodal", True)])
def test_keys_for_images_are_refused_with_the_line_to_write(base_dir, tmp_path, key, value):
    config = dpo_config(base_dir, tmp_path / "out", **{key: value})
    with pytest.raises(ConfigError, match=f"`{key}: {value}` is for images.*Write: {key}: null$"):
        read_settings(typed(config))
