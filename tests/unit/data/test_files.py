"""Rows of local files and folders come as they are written, whatever the kind of file and the reader's cache."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, Value

from dpo_plugin.data.sources import local_source
from dpo_plugin.errors import DataError, RowError
from tests.support.prepared import in_memory
from tests.support.tiny import chat_row, write_rows
from tests.unit.data.test_prepare import preparation

ANSWERS = ["0000000", "0.50", "TRUE", "None", "NA", "nan", "null", "1e3", "2024-01-01", "-", "#N/A", " yes "]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
OTHER_CALL = {"type": "function", "function": {"name": "say", "arguments": {"text": "hi"}}}


def read(path, **entry):
    return list(local_source({"path": str(path), **entry}).read())


def write_csv(path, answers):
    path.write_text("prompt,chosen,rejected\n" + "".join(f"q,{answer},other\n" for answer in answers))
    return path


def tool_row(call):
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("add", "say")
    ]
    tools[0]["function"]["description"] = "Adds."
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {
        "prompt": [{"role": "user", "content": "1 + 1?"}],
        "chosen": [answer],
        "rejected": "no idea",
        "tools": tools,
    }


@pytest.mark.parametrize("folder", [False, True])
def test_csv_is_read_as_text(tmp_path, folder):
    (tmp_path / "set").mkdir()
    file = write_csv(tmp_path / "set/train.csv", ANSWERS)
    assert [row["chosen"] for row in read(file.parent if folder else file)] == ANSWERS


def test_csv_through_the_hosts_loader_is_read_as_text(tmp_path, monkeypatch):
    from axolotl.utils.data import shared
    from axolotl.utils.dict import DictDefault

    from dpo_plugin.host import datasets as host_datasets

    file = write_csv(tmp_path / "rows.csv", ANSWERS)

    def from_url(entry, *_, **__):  # what the host does with a URL, which needs the network
        return shared.load_dataset("csv", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(host_datasets, "load_dataset_with_config", from_url)
    source = host_datasets._source(DictDefault({}), {"path": "https://host/rows.csv"}, "datasets[0]")
    assert [row["chosen"] for row in source.read()] == ANSWERS


def test_lines_of_csv(tmp_path):
    file = tmp_path / "rows.csv"
    lines = [
        b"\xef\xbb\xbfprompt,chosen,rejected", b'"a, ""b""\nc",yes,no', b"", b"q,1,2,3", b"q,\xff,no", b'q,"x"y,no',
        b"q,short", b"q," + b"long " * 40_000 + b",no",
    ]  # fmt: skip
    file.write_bytes(b"\n".join(lines))
    first, *wrong, short, long = read(file)
    assert first == {"prompt": 'a, "b"\nc', "chosen": "yes", "rejected": "no"}
    assert [str(error) for error in wrong] == [
        "the line has 4 fields, the header 3", "the line is not UTF-8", "the line is not CSV: ',' expected after '\"'",
    ]  # fmt: skip
    assert short == {"prompt": "q", "chosen": "short"}
    assert len(long["chosen"]) == 200_000


def test_a_quote_that_is_never_closed_stops_and_names_the_line(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('prompt,chosen,rejected\nq,a,b\nq,"a,b\n' + "q,a,b\n" * 9)
    with pytest.raises(DataError, match=r"from line 3 on.*Write a quote inside"):
        read(file)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "save_to_disk", "folder"])
def test_tables_render_tools_and_calls_as_json_lines_do(tokenizer, tmp_path, kind):
    rows = [tool_row(CALL), tool_row(OTHER_CALL)]
    rows = [{**row, "rejected": [{"role": "assistant", "content": row["rejected"]}]} for row in rows]
    plain = in_memory(preparation(tokenizer, write_rows(tmp_path / "rows.jsonl", rows)))[0]
    table = pa.Table.from_pylist(rows)
    path = tmp_path / f"set.{kind}"
    if kind == "arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif kind == "save_to_disk":
        Dataset(table).save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        pq.write_table(table, path / "train.parquet")
    else:
        pq.write_table(table, path)
    found = in_memory(preparation(tokenizer, path))[0]
    assert "null" not in tokenizer.decode(found[0]["prompt_ids"] + found[0]["chosen_ids"])
    assert found[:] == plain[:]


def test_a_column_of_json_is_parsed(tmp_path):
    features = Features(
        {"prompt": Value("string"), "chosen": Value("string"), "rejected": Value("string"), "tools": Json()}
    )
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "tools": [{"name": "add"}]}
    Dataset.from_list([row], features=features).to_parquet(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == [row]


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder", "text"])
def test_a_file_overwritten_with_its_time_kept_is_read_anew(tmp_path, kind):
    file = tmp_path / "set" / f"train.{'csv' if kind == 'csv' else 'parquet'}"
    file.parent.mkdir()

    def write(answer):
        if kind in ("csv", "text"):
            write_csv(file, [answer])
        else:
            pq.write_table(pa.Table.from_pylist([{"prompt": "q", "chosen": answer, "rejected": "x"}]), file)
        os.utime(file, (1_000_000, 1_000_000))
        rows = read(file.parent if kind == "folder" else file, **({"ds_type": "text"} if kind == "text" else {}))
        return "".join(map(str, rows))

    assert "first" in write("first")
    assert "other" in write("other")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_byte_order_mark_costs_no_row(tmp_path, name):
    rows = [chat_row(f"q{n}", "a", "b") for n in range(3)]
    text = json.dumps(rows) if name == "rows.json" else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read(tmp_path / name) == rows


class TestArrays:
    def test_items_come_across_the_edges_of_what_is_read_at_a_time(self, tmp_path, monkeypatch):
        rows = [{"n": n, "text": 'é\\"]},' * (n % 7)} for n in range(200)]
        (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
        for chunk in (1, 2, 3, 7, 64, 1 << 20):
            monkeypatch.setattr("dpo_plugin.data.files._CHUNK", chunk)
            if chunk < 64:
                (tmp_path / "rows.json").write_text(json.dumps(rows[:9], indent=1, ensure_ascii=False))
            else:
                (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
            assert read(tmp_path / "rows.json") == rows[: 9 if chunk < 64 else 200]

    @pytest.mark.parametrize("text", ["[]", " [ ] ", '[{"a": 1}]', '[1, {"a": 1} , "x"]\n'])
    def test_gives_what_json_gives(self, tmp_path, text):
        (tmp_path / "rows.json").write_text(text)
        found = read(tmp_path / "rows.json")
        assert [row for row in found if not isinstance(row, RowError)] == [
            row for row in json.loads(text) if isinstance(row, dict)
        ]
        assert len(found) == len(json.loads(text))

    @pytest.mark.parametrize("text", ["[", "[{}", "[{},]", "[{} {}]", "[,]", "[{}] x", "[1", "[nul]", '["a]'])
    def test_what_is_no_array_stops(self, tmp_path, text):
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(DataError, match="Write one object per line"):
            read(tmp_path / "rows.json")

    def test_an_item_nested_too_deep_is_one_bad_row(self, tmp_path):
        deep = '{"chosen": ' + "[" * 100_000 + '"]"' + "]" * 100_000 + "}"
        (tmp_path / "rows.json").write_text(f'[{{"n": 1}}, {deep}, {{"n": {"9" * 5000}}}, {{"n": 3}}]')
        first, *wrong, last = read(tmp_path / "rows.json")
        assert (first, last) == ({"n": 1}, {"n": 3})
        assert [type(error) for error in wrong] == [RowError, RowError]


def test_a_row_of_parquet_that_is_not_utf8_is_one_bad_row(tmp_path):
    chosen = pa.array([b"yes", b"\xff\xfe", b"no"]).view(pa.binary()).cast(pa.binary())
    table = pa.table({"chosen": pa.Array.from_buffers(pa.string(), 3, chosen.buffers())})
    pq.write_table(table, tmp_path / "rows.parquet")
    first, wrong, last = read(tmp_path / "rows.parquet")
    assert (first, last) == ({"chosen": "yes"}, {"chosen": "no"})
    assert "not UTF-8" in str(wrong)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, kind):
    file = tmp_path / f"rows.{kind}"
    file.write_bytes(b'\xff"\x00PAR1' * 9)
    with pytest.raises(DataError, match=rf"rows\.{kind} cannot be read as {kind}"):
        read(file)


def test_reading_parquet_holds_no_row_group_that_was_read(tmp_path):
    file = tmp_path / "rows.parquet"
    table = pa.table({"prompt": [f"{number:0>1000}" for number in range(40_000)]})
    pq.write_table(table, file, row_group_size=2000, compression="none")
    before, most = pa.total_allocated_bytes(), 0
    for number, _ in enumerate(local_source({"path": str(file)}).read()):
        if number % 1000 == 0:
            most = max(most, pa.total_allocated_bytes() - before)
    assert number == 39_999
    assert most < table.nbytes / 4
