"""Every YAML block of the documents, put into a config of a tiny run, passes the host's validator and our settings."""

import re
from pathlib import Path

import pytest
import yaml

from tests.support import host
from tests.support.tiny import ROOT, chat_row, dpo_config, write_rows

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_yaml_is_a_config(block: str, base_dir: Path, sft_dir: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("SFT_LoRA").symlink_to(sft_dir)
    instruction = {"prompt": "Why?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    write_rows(tmp_path / "prompts.jsonl", [instruction])
    write_rows(tmp_path / "pairs.jsonl", [{**chat_row("Question?", "Good.", "Bad."), "best": "Good."}] * 4)
    data = [{"path": "pairs.jsonl", "ds_type": "json", "type": "dpo_plugin.chat"}]
    written = yaml.safe_load(block)
    assert written
    written.pop("base_model", None)  # is on the hub
    written.pop("load_in_4bit", None)  # the tiny base of the tests is not in 4 bits
    written.pop("bf16", None)  # asks for a GPU
    config = {**dpo_config(base_dir, tmp_path / "out"), "lora_model_dir": "SFT_LoRA", "datasets": data}
    config |= {**({} if "val_set_size" in written else {"test_datasets": data}), **written}
    if config["adapter"] == "qlora":
        config["adapter"] = "lora"
    if (section := config.get("dpo_plugin") or {}).get("loading") == "sharded":
        del section["loading"]  # asks for an engine that shards, and here is one process
    cfg = host.load_config(config, tmp_path)
    assert not [key for key in written if key not in cfg], "the host's schema drops these keys without a word"


def test_there_are_blocks():
    assert len(BLOCKS) >= 6
