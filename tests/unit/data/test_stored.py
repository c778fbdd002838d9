"""Prepared pairs on disk: the same as ever, written as they come, whole or prepared anew, shared by users."""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from dpo_plugin.data import prepare as prepare_module
from dpo_plugin.data.prepare import LengthLimit, Preparation
from dpo_plugin.errors import DataError
from tests.support.tiny import ROOT, chat_row, write_rows
from tests.unit.data.test_prepare import preparation, rows


def digest(data, audit):
    """Of every column of every row, in order, and of the audit without the path."""
    content = {name: data[name][:] for name in data.column_names}
    audit = {key: value for key, value in audit.items() if key != "path"}
    return hashlib.sha256(json.dumps([content, audit]).encode()).hexdigest()[:16]


def mixed_rows(folder):
    shipped = [json.loads(line) for line in (ROOT / "recipes/data/preferences.jsonl").read_text().splitlines()]
    wrong = [{"chosen": 1}, chat_row("q", "same", "same"), chat_row("q", "", "b"), chat_row("<|im_end|>", "a", "b")]
    return write_rows(folder / "rows.jsonl", [*shipped[:100], *wrong, *shipped[50:], "text"])


# What the algorithm that held all rows in memory (the first version of data/prepare.py) made of the same rows.
BEFORE = [
    (LengthLimit(60), {}, "35083a7189a75ff9"),
    (LengthLimit(60, "truncate"), {}, "d5592b45f817e130"),
    (LengthLimit(60, "truncate", "left"), {}, "c34863d6b064f38e"),
    (LengthLimit(512), {"drop_duplicates": True}, "9ea4ed22b42b5751"),
    (LengthLimit(512), {"sample_fraction": 0.3, "seed": 7}, "4d948ea2175988a5"),
]


@pytest.mark.parametrize(("limit", "options", "expected"), BEFORE)
def test_order_ids_and_audit_are_what_they_were(tokenizer, tmp_path, limit, options, expected):
    made = preparation(tokenizer, mixed_rows(tmp_path), limit, **options)
    assert digest(*made.load_or_run(tmp_path / "store")) == expected


def test_rows_are_read_as_they_are_written(tokenizer, tmp_path, monkeypatch):
    """No more than one batch is in memory: the next rows are asked for when the batch before is on disk."""
    monkeypatch.setattr(prepare_module, "_BATCH", 5)
    made = preparation(tokenizer, write_rows(tmp_path / "rows.jsonl", rows(23)))
    plain, seen = Preparation._numbered, []
    monkeypatch.setattr(Preparation, "_numbered", lambda self: (seen.append(row[0]) or row for row in plain(self)))
    audit = prepare_module.Audit()
    read_at = [(batch.num_rows, len(seen)) for batch in made.batches(audit)]
    assert read_at == [(5, 5), (5, 10), (5, 15), (5, 20), (3, 23)]


def ids_of(made, folder):
    data, audit = made.load_or_run(folder)
    return data["chosen_ids"][:], audit["kept"]


def damages():
    def flip(file):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    def truncate(file):
        os.truncate(file, file.stat().st_size // 2)

    def remove(file):
        file.unlink()

    def grow(file):
        file.write_bytes(file.read_bytes() + b"0")

    def folder(file):
        file.unlink()
        file.mkdir()

    def dangle(file):
        file.unlink()
        file.symlink_to("nowhere")

    return [flip, truncate, remove, grow, folder, dangle]


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_folder_is_prepared_anew_and_said_once(tokenizer, tmp_path, caplog, damage):
    made = preparation(tokenizer, write_rows(tmp_path / "rows.jsonl", rows()))
    whole = ids_of(made, tmp_path / "store")
    (store,) = (path for path in (tmp_path / "store").iterdir() if path.is_dir())
    names = sorted(file.name for file in store.iterdir())
    assert len(names) >= 3
    for name in names:
        damage(store / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert ids_of(made, tmp_path / "store") == whole
            assert ids_of(made, tmp_path / "store") == whole
        assert [str(store) in record.getMessage() for record in caplog.records] == [True]


def test_a_folder_of_other_rows_under_this_name_is_prepared_anew(tokenizer, tmp_path):
    made = preparation(tokenizer, write_rows(tmp_path / "rows.jsonl", rows()))
    whole = ids_of(made, tmp_path / "a")
    other = preparation(tokenizer, write_rows(tmp_path / "other.jsonl", rows(3)))
    ids_of(other, tmp_path / "b")
    (ours,), (theirs,) = ([path for path in (tmp_path / name).iterdir() if path.is_dir()] for name in "ab")
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    assert ids_of(made, tmp_path / "a") == whole


def test_a_file_where_the_folder_should_be_is_replaced(tokenizer, tmp_path):
    made = preparation(tokenizer, write_rows(tmp_path / "rows.jsonl", rows()))
    whole = ids_of(made, tmp_path / "store")
    (store,) = (path for path in (tmp_path / "store").iterdir() if path.is_dir())
    shutil.rmtree(store)
    store.write_text("x")
    assert ids_of(made, tmp_path / "store") == whole


def test_shuffles_leave_nothing_in_the_folder(tokenizer, tmp_path):
    made = preparation(tokenizer, write_rows(tmp_path / "rows.jsonl", rows()))
    data, _ = made.load_or_run(tmp_path / "store")
    before = sorted((tmp_path / "store").rglob("*"))
    data.shuffle(seed=1).train_test_split(0.5)
    assert sorted((tmp_path / "store").rglob("*")) == before


@contextmanager
def another_user():
    """Whom permissions bind, also where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared():
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(folder)


class TestSecondUser:
    def test_reads_a_whole_folder_that_may_not_be_written(self, tokenizer, shared):
        made = preparation(tokenizer, write_rows(shared / "rows.jsonl", rows()))
        whole = ids_of(made, shared / "store")
        for path in [shared / "store", *(shared / "store").rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        with another_user():
            assert ids_of(made, shared / "store") == whole

    def test_files_are_made_for_others_to_read(self, tokenizer, shared):
        made = preparation(tokenizer, write_rows(shared / "rows.jsonl", rows()))
        umask = os.umask(0o022)
        try:
            ids_of(made, shared / "store")
        finally:
            os.umask(umask)
        modes = {path.stat().st_mode & 0o777 for path in (shared / "store").rglob("*") if path.is_dir()}
        assert modes == {0o755}

    @pytest.mark.parametrize("whole", [True, False])
    def test_is_told_what_to_write_where_nothing_can_be(self, tokenizer, shared, whole):
        made = preparation(tokenizer, write_rows(shared / "rows.jsonl", rows()))
        (shared / "store").mkdir()
        if whole:
            ids_of(made, shared / "store")
            next((shared / "store").rglob("seal")).write_text("x")
        for path in [shared / "store", *(shared / "store").rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        with (
            another_user(),
            pytest.raises(DataError, match=r"Permission denied.*Write: dataset_prepared_path: <a folder"),
        ):
            made.load_or_run(shared / "store")


def test_a_full_disk_names_folder_and_bytes(tokenizer, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(prepare_module, "_BATCH", 50)
    made = preparation(tokenizer, write_rows(tmp_path / "rows.jsonl", rows(200)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # stands in for a full disk: writing past it fails
    try:
        with pytest.raises(DataError) as told:
            made.load_or_run(tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.value.__cause__.errno == errno.EFBIG
    found = str(told.value)
    assert str(tmp_path / "store") in found
    assert found.endswith("Write: dataset_prepared_path: <a folder on a larger disk>")
    wanted = int(found.partition("About ")[2].split()[0].replace(",", ""))
    assert not [path for path in (tmp_path / "store").iterdir() if path.is_dir()]
    made.load_or_run(tmp_path / "store")
    written = next((tmp_path / "store").rglob("pairs.arrow")).stat().st_size
    assert 0.5 < wanted / written < 2


@pytest.mark.parametrize("path", ["/dev/null", "file"])
def test_a_path_that_is_no_folder_is_an_error(tokenizer, tmp_path, path):
    (tmp_path / "file").write_text("x")
    made = preparation(tokenizer, write_rows(tmp_path / "rows.jsonl", rows()))
    with pytest.raises(DataError, match=r"dataset_prepared_path: .*Write: dataset_prepared_path: "):
        made.load_or_run(tmp_path / path)
