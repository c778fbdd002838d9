"""The tiny base model, adapters and configs that tests share."""

from __future__ import annotations

import importlib.util
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

ROOT = Path(__file__).parents[2]
LEFT_BY_BUILDS = shutil.ignore_patterns("*.egg-info", "__pycache__", "build", ".*_cache")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MOE = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Settings of mixtures of four experts, of which a token takes two."""
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_quant_storage=torch.bfloat16,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
"""As axolotl quantises by the 72B recipes."""


@cache
def assets() -> Any:
    spec = importlib.util.spec_from_file_location("tiny_assets", ROOT / "examples" / "tiny_assets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def tokenizer() -> Any:
    return assets().make_tokenizer([m["content"] for chat in assets().conversations() for m in chat])


def save_base(folder: Path, seed: int = 0, layers: int = 4) -> Path:
    torch.manual_seed(seed)
    assets().make_model(len(tokenizer()), tokenizer(), layers).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def moe_config(kind: str) -> Any:
    """Config of a mixture of experts of one of the kinds in `MOE`, of two layers."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    ids = {"eos_token_id": tokenizer().eos_token_id, "pad_token_id": tokenizer().pad_token_id, "bos_token_id": None}
    return AutoConfig.for_model(kind, vocab_size=len(tokenizer()), **shape, **heads, **ids, **MOE[kind])


def save_moe(kind: str, folder: Path) -> Path:
    """Save a random mixture of experts, whose router is not at its start of zeros."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(moe_config(kind))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_adapter(base_dir: Path, folder: Path, seed: int = 1, **settings: Any) -> Path:
    """Save a LoRA with random A, B and magnitudes."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    config = LoraConfig(
        **{"r": 8, "lora_alpha": 16, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **settings}
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(str(folder))
    return folder


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_row(question: str, chosen: str, rejected: str, source: str = "made") -> dict[str, Any]:
    ask = {"role": "user", "content": question}
    return {
        "source": source,
        "prompt": question,
        "chosen": [ask, {"role": "assistant", "content": chosen}],
        "rejected": [ask, {"role": "assistant", "content": rejected}],
    }


def example(prompt: int, chosen: int, rejected: int, common: int = 0, seed: int = 0, **more: Any) -> dict[str, Any]:
    """Random ids of a pair whose answers begin with the same `common` tokens."""
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 250, (count,), generator=draw).tolist()

    begin = ids(common)
    sides = {
        "chosen_ids": [*begin, 1, *ids(chosen - common - 1)],
        "rejected_ids": [*begin, 2, *ids(rejected - common - 1)],
    }
    return {"prompt_ids": ids(prompt), **sides, **more}


def dpo_config(base_dir: Path, output_dir: Path, **settings: Any) -> dict[str, Any]:
    """A DPO config on the tiny base; settings replace or add keys, None removes one.

    A report is written where it is asked for: its charts take longer to draw than four steps take to train.
    """
    config = {
        "base_model": str(base_dir),
        "output_dir": str(output_dir),
        "plugins": ["dpo_plugin.DPOPlugin"],
        "rl": "dpo",
        "rl_beta": 0.1,
        "datasets": [
            {"path": str(ROOT / "recipes/data/preferences.jsonl"), "ds_type": "json", "type": "dpo_plugin.chat"}
        ],
        "dataset_prepared_path": str(output_dir.parent / "prepared"),
        "sequence_len": 256,
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target_modules": PROJECTIONS,
        "max_steps": 4,
        "num_epochs": 1,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "bf16": False,
        "tf32": False,
        "lora_mlp_kernel": False,  # these kernels need a GPU
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 4,
        "save_only_model": False,
        "seed": 42,
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        **settings,
    }
    if config["plugins"]:
        config["dpo_plugin"] = {"report": False, **(config.get("dpo_plugin") or {})}
    return {key: value for key, value in config.items() if value is not None}


def copy_tree(folder: Path) -> None:
    """Copy what a wheel of ours is built from, as a build leaves its own folders behind."""
    for name in ("src", "recipes", "deepspeed_configs", "fsdp_configs"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=LEFT_BY_BUILDS)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
