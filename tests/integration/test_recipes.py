"""Every shipped recipe passes axolotl's validator with the plugin loaded, and names only files that exist."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import bases as bases_of
from tests.support import host, tiny
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
    if raw.dpo_plugin and (raw.dpo_plugin.reference or {}).get("adapter_dir"):
        raw.dpo_plugin.reference.adapter_dir = str(adapter_dir)
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


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Family → folder of its tiny base."""
    return {family: bases_of.save(family, tmp_path_factory.mktemp(family)) for family in bases_of.FAMILIES}


def rows_for(recipe: dict[str, Any], folder: Path) -> Path:
    """Rows of the demo's data in the columns of the recipe's data set, without those its template cannot hold."""
    rows = [json.loads(line) for line in (ROOT / "recipes/data/preferences.jsonl").read_text("utf-8").splitlines()][:64]
    if recipe["base_model"].startswith("mistralai"):  # its template drops a system message once an answer follows
        rows = [row for row in rows if row["chosen"][0]["role"] != "system"]
    if "truthy-dpo" in recipe["datasets"][0]["path"]:
        system = {"role": "system", "content": "You are an unbiased assistant."}
        rows = [{**row, "chosen": [m for m in row["chosen"] if m["role"] != "system"]} for row in rows]
        rows = [row for row in rows if len(row["chosen"]) == 2]
        rows = [
            {
                "id": str(number),
                "source": row["source"],
                "system": system["content"] if number % 2 else "",
                "prompt": row["chosen"][0]["content"],
                "chosen": row["chosen"][-1]["content"],
                "rejected": row["rejected"][-1]["content"],
            }
            for number, row in enumerate(rows)
        ]
    return tiny.write_rows(folder / "rows.jsonl", rows)


ENGINE = {"deepspeed", "fsdp_version", "fsdp_config"}
TINY = {
    "max_steps": 2, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "val_set_size": 0.1, "save_strategy": "no",
    "save_steps": None, "save_total_limit": None, "bf16": False, "tf32": False, "gradient_checkpointing": False,
    "gradient_checkpointing_kwargs": None, "dataset_num_proc": 1, "dataloader_num_workers": 0,
    "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False,
}  # fmt: skip


@pytest.mark.parametrize("recipe", [r for r in RECIPES if not r.stem.startswith("tiny")], ids=lambda path: path.stem)
def test_a_recipe_prepares_its_rows_and_trains_two_steps(recipe, bases, tmp_path):
    """Base, sizes, paths and steps are tiny and the engine is one process; all else is the recipe's."""
    raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    base = bases[raw["base_model"].split("/")[0]]
    local = {"path": str(rows_for(raw, tmp_path)), "ds_type": "json"}
    config = {key: value for key, value in {**raw, **TINY}.items() if value is not None and key not in ENGINE}
    config |= {"base_model": str(base), "output_dir": str(tmp_path / "out")}
    config |= {"dataset_prepared_path": str(tmp_path / "prepared"), "datasets": [{**raw["datasets"][0], **local}]}
    if "lora_model_dir" in raw:
        shape = {"r": raw["lora_r"], "lora_alpha": raw["lora_alpha"]}
        config["lora_model_dir"] = str(tiny.save_adapter(base, tmp_path / "sft", **shape))
        if "adapter_dir" in config.get("dpo_plugin", {}).get("reference", {}):
            config["dpo_plugin"]["reference"]["adapter_dir"] = str(
                tiny.save_adapter(base, tmp_path / "ref", 2, **shape)
            )
    run = host.train(config, tmp_path / "run")
    audit = json.loads((run.output_dir / "data_audit.json").read_text(encoding="utf-8"))["datasets"][0]
    assert audit["kept"] == audit["read"] >= 30
    assert [line["step"] for line in run.lines] == [1, 2]
    if "adapter_dir" not in str(raw.get("dpo_plugin")):
        assert run.lines[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    example = run.trainer.train_dataset[0]
    tokens = run.trainer.processing_class.convert_ids_to_tokens(example["chosen_ids"][-1:])
    assert tokens == [run.trainer.processing_class.eos_token]


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


PUBLISHED = {
    "nemo12b-dpo": {
        "rl_beta": 0.05, "sequence_len": 2048, "gradient_accumulation_steps": 20, "num_epochs": 2,
        "learning_rate": 5e-6, "save_steps": 500,
    },
    "phi2-dpo-full": {"rl_beta": 0.2, "num_epochs": 1, "micro_batch_size": 4, "sequence_len": 512, "seed": 2003},
    "phi2-dpo-lora": {"rl_beta": 0.2, "num_epochs": 1, "micro_batch_size": 4, "sequence_len": 512, "seed": 2003},
    "qwen72b-dpo": {"rl_beta": 0.1, "learning_rate": 1e-5, "lora_r": 16, "lora_alpha": 16},
    "qwen72b-dpo-fsdp": {"rl_beta": 0.1, "learning_rate": 1e-5, "lora_r": 16, "lora_alpha": 16},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_values_and_lists_the_others(name):
    text = (ROOT / f"recipes/{name}.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(text)
    expected = PUBLISHED[name] | ({"gradient_accumulation_steps": 1} if "phi2" in name else {})
    assert {key: float(recipe[key]) for key in expected} == expected  # YAML 1.1 reads 5e-6 as text
    assert "# Differs:" in text.split("base_model:")[0]


def test_accelerates_fsdp_config_says_what_the_recipe_says():
    recipe = yaml.safe_load((ROOT / "recipes/qwen72b-dpo-fsdp.yaml").read_text(encoding="utf-8"))
    theirs = yaml.safe_load((ROOT / "fsdp_configs/fsdp2_qlora.yaml").read_text(encoding="utf-8"))
    without_prefix = {key.removeprefix("fsdp_"): value for key, value in theirs["fsdp_config"].items()}
    assert without_prefix == {"version": recipe["fsdp_version"], **recipe["fsdp_config"]}
    assert (theirs["mixed_precision"] == "bf16") is recipe["bf16"]


def test_both_72b_recipes_train_the_same():
    zero3, fsdp2 = (
        yaml.safe_load((ROOT / f"recipes/qwen72b-dpo{name}.yaml").read_text(encoding="utf-8")) for name in ("", "-fsdp")
    )
    engine = {"deepspeed", "fsdp_version", "fsdp_config", "output_dir", "bnb_config_kwargs"}
    assert {k: v for k, v in zero3.items() if k not in engine} == {k: v for k, v in fsdp2.items() if k not in engine}


def test_the_72b_shape_has_the_published_number_of_trainable_parameters():
    """r (in + out) for q, k, v, o, gate, up, down of 80 layers, hidden 8192, 64 and 8 heads of 128, MLP 29568, r = 16."""
    from accelerate import init_empty_weights
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    recipe = yaml.safe_load((ROOT / "recipes/qwen72b-dpo-fsdp.yaml").read_text(encoding="utf-8"))
    config = Qwen2Config(
        hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False,
    )  # fmt: skip
    lora = LoraConfig(r=recipe["lora_r"], target_modules=recipe["lora_target_modules"], task_type="CAUSAL_LM")
    with init_empty_weights():
        model = get_peft_model(Qwen2ForCausalLM(config), lora)
    by_hand = 80 * 16 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 29568))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == by_hand == 210_534_400
    found = {name.split(".lora_")[0].split(".")[-1] for name, _ in model.named_parameters() if ".lora_" in name}
    assert found == set(recipe["lora_target_modules"])
    units = [m for m in model.modules() if type(m).__name__ == recipe["fsdp_config"]["transformer_layer_cls_to_wrap"]]
    assert len(units) == 80
    assert type(units[0]).__name__ in Qwen2ForCausalLM._no_split_modules  # what ZeRO-3 fetches one after another


def test_the_preference_set_is_what_the_readme_says():
    files = [ROOT / "recipes/data" / name for name in ("preferences.jsonl", "preferences_heldout.jsonl")]
    train, held_out = ([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files)
    assert len(train) >= 240
    assert len({row["source"] for row in train}) >= 3
    assert any(row["chosen"][0]["role"] == "system" for row in train)
    assert any(len(row["chosen"]) > 3 for row in train)
    assert any(len(row["chosen"][-1]["content"].split()) == 1 for row in train)
    assert not {json.dumps(row["chosen"]) for row in train} & {json.dumps(row["chosen"]) for row in held_out}
