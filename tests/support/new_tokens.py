"""A tiny base, and axolotl's own SFT on it with tokens that it does not know."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from tests.support import host, tiny
from tests.support.tiny import ROOT

TOKENS = ["<|tool|>", "<|/tool|>"]
NEW = {"tokens": TOKENS, "lora_modules_to_save": ["embed_tokens", "lm_head"]}
ROWS = [tiny.chat_row(f"Call {n}", f"<|tool|> {n} <|/tool|>", f"I cannot call {n}.") for n in range(16)]


def save_base(folder: Path, tied: bool) -> Path:
    """The tiny base; untied, its head has weights of its own."""
    tiny.save_base(folder)
    if not tied:
        config = AutoModelForCausalLM.from_pretrained(folder).config
        config.tie_word_embeddings = False
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def run_sft(base: Path, folder: Path) -> Path:
    """Two steps of axolotl's SFT on ids that contain the new tokens."""
    from axolotl.common.datasets import TrainDatasetMeta
    from axolotl.loaders import load_tokenizer
    from axolotl.train import train

    recipe = yaml.safe_load((ROOT / "recipes/tiny-sft.yaml").read_text(encoding="utf-8"))
    paths = {"base_model": str(base), "output_dir": str(folder / "sft"), "dataset_prepared_path": str(folder / "data")}
    cfg = host.load_config({**recipe, **paths, **NEW, "max_steps": 2}, folder)
    ids = load_tokenizer(cfg)([row["chosen"][-1]["content"] for row in ROWS])["input_ids"]
    rows = [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids]
    train(cfg=cfg, dataset_meta=TrainDatasetMeta(Dataset.from_list(rows), None, 2))
    return folder / "sft"


def dpo_settings(sft: Path, folder: Path) -> dict[str, object]:
    """The keys of a DPO config that has the new tokens, their data included."""
    rows = tiny.write_rows(folder / "rows.jsonl", ROWS)
    data = {"path": str(rows), "ds_type": "json", "type": "dpo_plugin.chat"}
    held_out = [{**data, "split": "train"}]
    settings = {"lora_model_dir": str(sft), "lora_r": 16, "lora_alpha": 32}
    return {**NEW, **settings, "datasets": [data], "test_datasets": held_out}


def resized(base: Path) -> AutoModelForCausalLM:
    """The base with room for the new tokens."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tiny.tokenizer()) + len(TOKENS))
    return model
