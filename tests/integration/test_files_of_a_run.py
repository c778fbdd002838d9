"""docs/files.md against what a run leaves in its output folder."""

import fnmatch
import re

import pytest

from tests.support import host
from tests.support.tiny import ROOT, chat_row, dpo_config, write_rows


def named() -> dict[str, str]:
    """Pattern of a file in output_dir → when it is there, as the page says."""
    text = (ROOT / "docs/files.md").read_text(encoding="utf-8").split("\n## Elsewhere")[0]
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \| [^|]+ \|$", text, re.M)
    return {pattern: when.strip() for patterns, when in rows for pattern in re.findall(r"`([^`]+)`", patterns)}


@pytest.fixture(scope="module")
def left(base_dir, sft_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    rows = [chat_row(f"Question {n}?", f"Good answer {n}.", f"Bad {n}.") for n in range(8)]
    data = [{"path": str(write_rows(folder / "rows.jsonl", rows)), "ds_type": "json", "type": "dpo_plugin.chat"}]
    settings = {
        "lora_model_dir": str(sft_dir), "datasets": data, "test_datasets": data, "save_strategy": "epoch",
        "save_steps": None, "dpo_plugin": {"samples": {"max_new_tokens": 4}},
    }  # fmt: skip
    config = dpo_config(base_dir, folder / "out", **settings)
    del config["dpo_plugin"]["report"]  # written by default
    run = host.train(config, folder)
    files = (path.relative_to(run.output_dir).as_posix() for path in run.output_dir.rglob("*") if path.is_file())
    return sorted({re.sub(r"^checkpoint-\d+/", "checkpoint-N/", file) for file in files})


def test_every_file_is_on_the_page(left):
    assert not [file for file in left if not any(fnmatch.fnmatch(file, pattern) for pattern in named())]


def test_every_file_of_the_page_that_this_run_should_leave_is_there(left):
    usual = [pattern for pattern, when in named().items() if when in ("always", "`samples`")]
    assert len(usual) >= 8
    assert not [pattern for pattern in usual if not fnmatch.filter(left, pattern)]
