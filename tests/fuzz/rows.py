"""Seeded hostile rows in every format and kind of file: each is kept as it was given, or one counted row.

python -m tests.fuzz.rows --cases 2000
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from dpo_plugin.data.audit import audit_lines
from dpo_plugin.data.formats import FORMATS
from dpo_plugin.data.prepare import LengthLimit, Preparation, PrepareOptions
from dpo_plugin.data.render import Renderer
from dpo_plugin.data.sources import local_source
from dpo_plugin.errors import DPOPluginError
from tests.support import tiny

ROWS = 20  # of a file
KINDS = ("jsonl", "json", "csv", "parquet", "arrow", "save_to_disk")
TABLES = ("parquet", "arrow", "save_to_disk")

TEXTS = [
    "\ud800", "a\udfff", "\x00", "\x1b[2J", "\x9b1m", "\u202e", "\ufeff", "\r\n", "\n```\n", "", " ", "\t", "NA", "nan",
    "None", "null", "TRUE", "0.50", "0000000", "1e5", "<|im_end|>", "x<|im_start|>user", "<|endoftext|>", "$\\frac{$",
    "[/red]", "</think>", "{{ x }}", "{% raw %}", '"', '""', ",", ";", "'", "\\", "\\n", "🙂", "é", "e\u0301", "word " * 400,
    "\n\nHuman: hi", "\u2028", "🏳️‍🌈", "[" * 100_000, '{"a":' * 2_000, "=1+1", "#", "-",
]  # fmt: skip
VALUES = [
    None, 0, -1, 1.5, True, 10**30, [], {}, [[]], [None], [{}], [{"role": "user"}], [{"role": 3, "content": "a"}],
    [{"role": "assistant", "content": None}], {"role": "assistant"}, [{"from": "gpt", "value": "a"}], ["a"], float("nan"),
    {"role": "assistant", "content": "a", "tool_calls": "[" * 100_000}, {"a": {"b": "<|im_end|>"}}, "[" * 100_000,
    [{"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "<|im_end|>"}}]}],
]  # fmt: skip
LINES = [
    b"{",
    b"[1]",
    b'"x"',
    b"\xff\xfe",
    b"nul",
    b"{}",
    b'{"chosen": NaN}',
    b"[" * 100_000,
    b"\xef\xbb\xbf{}",
    b"\x00",
    b"9" * 5000,
]


@dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        kind: One of `KINDS`.
        format: A key of `FORMATS`.
        rows: Its rows; bytes are a line of JSON lines as it stands.
        clean: Which rows nothing was done to.
    """

    kind: str
    format: str
    rows: list[Any]
    clean: set[int]


def cases(seed: int, count: int) -> Iterator[Case]:
    """Files of `ROWS` rows, together at least ``count`` rows."""
    draw = random.Random(seed)
    for number in range(-(-count // ROWS)):
        kind = KINDS[number % len(KINDS)]
        shapes = ("prompt", "question", "hh_rlhf", "text") if kind == "csv" else tuple(SHAPES)
        shape = draw.choice(shapes)
        rows = [SHAPES[shape](f"question {number} {row}?", f"yes {row}", f"no {row}") for row in range(ROWS)]
        clean = set(range(0, ROWS, 4))
        for at in set(range(ROWS)) - clean:
            rows[at] = _hostile(draw, rows[at], kind)
        yield Case(kind, shape, rows, clean)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _conversation(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    history = [_turn("system", "Be kind."), _turn("user", "Hi"), _turn("assistant", "Hello."), _turn("user", question)]
    sides = {"chosen": [*history, _turn("assistant", chosen)], "rejected": [*history, _turn("assistant", rejected)]}
    return {**sides, "prompt": "Hi", "source": "s", "tools": None}


def _answers(**prompt: Any) -> Callable[[str, str], dict[str, Any]]:
    return lambda chosen, rejected: {**prompt, "chosen": chosen, "rejected": rejected, "source": "s"}


SHAPES: dict[str, Callable[[str, str, str], dict[str, Any]]] = {
    "conversations": _conversation,
    "ultrafeedback": _conversation,
    "chat": _conversation,
    "prompt": lambda q, a, b: _answers(prompt=q, system="Be kind.")(a, b),
    "messages": lambda q, a, b: _answers(messages=[_turn("user", q)])(a, b),
    "question": lambda q, a, b: _answers(question=q, system="")(a, b),
    "hh_rlhf": lambda q, a, b: _answers()(f"\n\nHuman: {q}\n\nAssistant: {a}", f"\n\nHuman: {q}\n\nAssistant: {b}"),
    "text": lambda q, a, b: _answers(prompt=q)(a, b),
}  # fmt: skip


def _hostile(draw: random.Random, row: dict[str, Any], kind: str) -> Any:
    row = copy.deepcopy(row)
    if kind == "jsonl" and draw.random() < 0.1:
        return draw.choice(LINES)
    if kind in ("jsonl", "json") and draw.random() < 0.4:
        column = draw.choice([*row, "tools", "chat_template_kwargs", "source"])
        if draw.random() < 0.2:
            row.pop(column, None)
        else:
            row[column] = copy.deepcopy(draw.choice(VALUES))
        return row
    text = draw.choice(TEXTS)
    if kind not in ("jsonl", "json"):  # which cannot hold it
        text = text.encode("utf-8", "replace").decode()
    places = [(row, key) for key, value in row.items() if isinstance(value, str)]
    places += [(turn, "content") for value in row.values() if isinstance(value, list) for turn in value]
    holder, key = draw.choice(places)
    holder[key] = draw.choice([text, f"{holder[key]} {text}", f"{text}{holder[key]}"])
    return row


def write(case: Case, folder: Path) -> Path:
    """The case as a file or folder."""
    path = folder / f"rows.{case.kind}"
    if case.kind in TABLES:
        table = pa.Table.from_pylist(case.rows)
        if case.kind == "parquet":
            pq.write_table(table, path)
        elif case.kind == "arrow":
            with pa.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table)
        else:
            Dataset(table).save_to_disk(path)
    elif case.kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as handle:
            columns = list(case.rows[0])
            csv.writer(handle).writerows([columns, *([row[name] for name in columns] for row in case.rows)])
    elif case.kind == "json":
        path.write_text(json.dumps(case.rows))
    else:
        path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in case.rows))
    return path


def check(case: Case, renderer: Renderer, folder: Path) -> str:
    """What became of a case: ``read``, or the name of the error; fails if anything is lost, altered or bare."""
    options = PrepareOptions(LengthLimit(512), max_bad_rows=1.0)
    made = Preparation(
        "datasets[0]", local_source({"path": str(write(case, folder))}), FORMATS[case.format], renderer, options
    )
    try:
        data, audit = made.load_or_run(folder / "store")
    except DPOPluginError as error:
        return type(error).__name__ if len(str(error)) < 500 else "too long an error"
    assert audit["read"] == len(case.rows), case
    assert audit["kept"] + sum(audit["left_out"].values()) == audit["read"]
    assert {number + 1 for number in case.clean} <= set(data["row"]), (case, audit)
    lines = audit_lines([audit])
    assert all(line.isprintable() or "\u200d" in line or "\ufeff" in line for line in lines), lines
    for pair in data:
        _check_pair(case, pair, renderer)
    return "read"


def _check_pair(case: Case, pair: dict[str, Any], renderer: Renderer) -> None:
    row, tokenizer = case.rows[pair["row"] - 1], renderer.tokenizer
    pair["source"].encode()
    for side in ("chosen", "rejected"):
        ids, given = pair[f"{side}_ids"], row[side]
        text = given if isinstance(given, str) else _content(given if isinstance(given, dict) else given[-1])
        assert text.rpartition("\n\nAssistant: ")[2].strip() in tokenizer.decode(pair["prompt_ids"] + ids), (row, pair)
        if case.format != "text":  # which may bring control tokens of its own
            assert sum(ids.count(token) for token in renderer.end_of_turn_ids) == 1, (row, pair)


def _content(turn: dict[str, Any]) -> str:
    return str(turn["value"] if "from" in turn else turn["content"])


def main() -> None:
    """Run a campaign and print what became of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    renderer, found, rows = Renderer(tiny.tokenizer()), Counter[str](), 0
    for case in cases(arguments.seed, arguments.cases):
        with tempfile.TemporaryDirectory() as folder:
            found[f"{case.kind} {check(case, renderer, Path(folder))}"] += 1
        rows += len(case.rows)
    print(f"{rows} rows in {sum(found.values())} files: {dict(sorted(found.items()))}")


if __name__ == "__main__":
    main()
