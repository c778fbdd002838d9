"""The shipped 72B recipes with the base model, data and sizes of the tiny model; engine, precision and adapters stay."""

import torch
import yaml

from tests.support.tiny import ROOT

STEPS = 6
BF16 = {"load_in_4bit": False, "adapter": "lora", "bnb_config_kwargs": None}
ENGINES = {
    "ddp-nf4": ("qwen72b-dpo", {"deepspeed": None}),
    "zero3-nf4": ("qwen72b-dpo", {}),
    "fsdp2-nf4": ("qwen72b-dpo-fsdp", {}),
    "fsdp2-bf16": ("qwen72b-dpo-fsdp", BF16),
    "fsdp2-bf16-loaded-once": ("qwen72b-dpo-fsdp", {**BF16, "fsdp_config": {"cpu_ram_efficient_loading": True}}),
}


def config(name, base_dir, sft, folder, **settings):
    recipe, engine = ENGINES[name]
    shipped = yaml.safe_load((ROOT / f"recipes/{recipe}.yaml").read_text(encoding="utf-8"))
    data = {"ds_type": "json", "type": "dpo_plugin.chat", "split": "train"}
    sizes = {
        "base_model": str(base_dir),
        "lora_model_dir": str(sft),
        "output_dir": str(folder / "out"),
        "datasets": [{**data, "path": str(ROOT / "recipes/data/preferences.jsonl")}],
        "test_datasets": [
            {**data, "path": str(ROOT / "recipes/data/preferences_heldout.jsonl"), "split": "train[:24]"}
        ],
        "val_set_size": None,
        "dataset_prepared_path": str(folder.parent / "prepared"),
        "sequence_len": 256,
        "max_steps": STEPS,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-4,
        "warmup_ratio": None,
        "lr_scheduler": "constant",
        "eval_steps": STEPS,
        "save_steps": STEPS // 2,
        "tf32": False,
        "lora_mlp_kernel": False,  # these kernels need a GPU
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "dataset_num_proc": 1,
    }
    found = {**shipped, **engine, **sizes, **settings}
    found["dpo_plugin"] = {"report": False, **(found.get("dpo_plugin") or {})}
    if found.get("fsdp_config"):
        found["fsdp_config"] = {**shipped["fsdp_config"], **found["fsdp_config"]}
    return {key: value for key, value in found.items() if value is not None}


def curve(lines):
    return torch.tensor([[line["loss"], line["rewards/margins"]] for line in lines])
