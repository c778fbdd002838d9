"""Every shipped recipe passes axolotl's validator with the plugin loaded, and names only files that exist."""

import json
from pathlib import Path

import pytest
import yaml

from tests.support import tiny
from tests.support.tiny import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def validated(recipe: Path, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch):
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    monkeypatch.chdir(ROOT)
    raw = DictDefault(yaml.safe_load(recipe.read_text(encoding="utf-8")))
    if raw.lora_model_dir:
        raw.lora_model_dir = str(adapter_dir)
    PluginManager.get_instance().plugins.clear()
    prepare_plugins(raw)
    capabilities = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}
    return validate_config(raw, capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"})


def adapter_for(recipe: Path, base_dir: Path, folder: Path) -> Path:
    raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return tiny.save_adapter(base_dir, folder, r=raw.get("lora_r", 8), lora_alpha=raw.get("lora_alpha", 16))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_passes_the_hosts_validator(recipe, base_dir, tmp_path, monkeypatch):
    cfg = validated(recipe, adapter_for(recipe, base_dir, tmp_path), monkeypatch)
    raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert "dpo_plugin.DPOPlugin" in cfg.plugins
    assert (cfg.trainer_cls == "dpo_plugin.host.trainer.PreferenceTrainer") == (raw.get("rl") in ("dpo", "ipo"))
    unknown = [key for key in raw if key not in cfg]
    assert not unknown, "the host's schema drops these keys without a word"
    if deepspeed := raw.get("deepspeed"):
        assert (ROOT / deepspeed).is_file()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_what_hardware_and_command(recipe):
    head = recipe.read_text(encoding="utf-8").split("base_model:")[0]
    assert all(
        word in head for word in ("# What:", "# Hardware:", "# Command:", f"axolotl train recipes/{recipe.name}")
    )


def test_the_72b_recipe_is_the_published_one(base_dir, tmp_path, monkeypatch):
    recipe = ROOT / "recipes/qwen72b-dpo.yaml"
    cfg = validated(recipe, adapter_for(recipe, base_dir, tmp_path), monkeypatch)
    expected = {
        "adapter": "qlora", "load_in_4bit": True, "lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.05,
        "learning_rate": 1e-5, "rl_beta": 0.1, "warmup_ratio": 0.1, "micro_batch_size": 1,
        "gradient_accumulation_steps": 16, "bf16": True,
    }  # fmt: skip
    assert {key: cfg[key] for key in expected} == expected
    assert cfg.lr_scheduler == "linear"
    assert sorted(cfg.lora_target_modules) == sorted(tiny.PROJECTIONS)
    assert cfg.bnb_config_kwargs == {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    zero = json.loads((ROOT / "deepspeed_configs/zero3_bf16.json").read_text())["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["overlap_comm"] is zero["contiguous_gradients"] is True
    assert zero["reduce_bucket_size"] == zero["stage3_prefetch_bucket_size"] == 104857600
    assert zero["stage3_param_persistence_threshold"] == 1048576


def test_the_preference_set_is_what_the_readme_says():
    files = [ROOT / "recipes/data" / name for name in ("preferences.jsonl", "preferences_heldout.jsonl")]
    train, held_out = ([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files)
    assert len(train) >= 240
    assert len({row["source"] for row in train}) >= 3
    assert any(row["chosen"][0]["role"] == "system" for row in train)
    assert any(len(row["chosen"]) > 3 for row in train)
    assert any(len(row["chosen"][-1]["content"].split()) == 1 for row in train)
    assert not {json.dumps(row["chosen"]) for row in train} & {json.dumps(row["chosen"]) for row in held_out}
