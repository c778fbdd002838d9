"""Every shipped recipe passes axolotl's validator with the plugin loaded, and names only files that exist."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

from dpo_plugin.plan.planner import GIB, Machine, Planner
from tests.support import bases as bases_of
from tests.support import host, tiny
from tests.support.four_bit_experts import quantise_on_cpu
from tests.support.tiny import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
EXAMPLES = [ROOT / "examples/real" / f"{name}.yaml" for name in ("sft", "dpo", "round-2")]


def validated(recipe: Path, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    if raw.get("lora_model_dir"):
        raw["lora_model_dir"] = str(adapter_dir)
    if "adapter_dir" in raw.get("dpo_plugin", {}).get("reference", {}):
        raw["dpo_plugin"]["reference"]["adapter_dir"] = str(adapter_dir)
    for entry in raw["datasets"]:
        if entry["path"].startswith("./outputs/"):  # which another command makes
            entry["path"] = "./recipes/data/preferences.jsonl"
    return host.validated(raw)


def adapter_for(recipe: Path, base_dir: Path, folder: Path) -> Path:
    raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return tiny.save_adapter(base_dir, folder, r=raw.get("lora_r", 8), lora_alpha=raw.get("lora_alpha", 16))


def lora_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """The LoRA settings of a recipe under PEFT's names."""
    keys = ("lora_r", "lora_alpha", "lora_target_modules", "lora_target_parameters")
    return {key.removeprefix("lora_") if key != "lora_alpha" else key: recipe[key] for key in keys if key in recipe}


@pytest.mark.parametrize("recipe", [*RECIPES, *EXAMPLES], ids=lambda path: path.stem)
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
    return {family: bases_of.save(family, tmp_path_factory.mktemp("base")) for family in bases_of.FAMILIES}


def rows_for(recipe: dict[str, Any], folder: Path) -> Path:
    """Rows of the demo's data in the columns of the recipe's data set, without those its template cannot hold."""
    rows = [json.loads(line) for line in (ROOT / "recipes/data/preferences.jsonl").read_text("utf-8").splitlines()][:64]
    if recipe["base_model"].startswith(
        "mistralai/Mistral-Nemo"
    ):  # its template drops a system message once an answer follows
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
def test_a_recipe_prepares_its_rows_and_trains_two_steps(recipe, bases, tmp_path, monkeypatch):
    """Base, sizes, paths and steps are tiny and the engine is one process; all else is the recipe's."""
    raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    family = bases_of.family_of(raw["base_model"])
    base = bases[family]
    local = {"path": str(rows_for(raw, tmp_path)), "ds_type": "json"}
    config = {key: value for key, value in {**raw, **TINY}.items() if value is not None and key not in ENGINE}
    config |= {"base_model": str(base), "output_dir": str(tmp_path / "out")}
    config |= {"dataset_prepared_path": str(tmp_path / "prepared"), "datasets": [{**raw["datasets"][0], **local}]}
    if "lora_model_dir" in raw:
        shape = lora_of(raw)
        config["lora_model_dir"] = str(tiny.save_adapter(base, tmp_path / "sft", **shape))
        if "adapter_dir" in config.get("dpo_plugin", {}).get("reference", {}):
            config["dpo_plugin"]["reference"]["adapter_dir"] = str(
                tiny.save_adapter(base, tmp_path / "ref", 2, **shape)
            )
    if config.get("quantize_moe_experts"):
        quantise_on_cpu(monkeypatch.setattr)
    run = host.train(config, tmp_path / "run")
    audit = json.loads((run.output_dir / "data_audit.json").read_text(encoding="utf-8"))["datasets"][0]
    assert audit["kept"] == audit["read"] >= 30
    assert [line["step"] for line in run.lines] == [1, 2]
    if "adapter_dir" not in str(raw.get("dpo_plugin")):
        assert run.lines[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    example = run.trainer.train_dataset[0]
    if raw.get("adapter"):
        trained = {name for name, _ in run.trainer.model.policy_parameters()}
        assert any(".experts." in name for name in trained) is ("lora_target_parameters" in raw)
        assert not any("vision" in name for name in trained)
    tokens = run.trainer.processing_class.convert_ids_to_tokens(example["chosen_ids"][-1:])
    assert tokens == [bases_of.FAMILIES[family].end_of_turn]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_what_hardware_and_command(recipe):
    head = recipe.read_text(encoding="utf-8").split("base_model:")[0]
    assert all(
        word in head for word in ("# What:", "# Hardware:", "# Command:", f"axolotl train recipes/{recipe.name}")
    )


PUBLIC_SIZES: dict[str, tuple[dict[str, Any], int, float]] = {
    # Qwen/Qwen3-30B-A3B-Instruct-2507 and its card: 30.5B
    "qwen3-30b-a3b-dpo": (
        {
            "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
            "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "tie_word_embeddings": False,
        },
        # 48 layers · r = 8 · (q 2048 + 4096, k and v 2048 + 512, o 4096 + 2048, and of 128 experts gate and up
        # 2048 + 1536, down 768 + 2048)
        48 * 8 * (2 * 6144 + 2 * 2560 + 128 * (3584 + 2816)),
        30.5,
    ),
    # google/gemma-3-12b-it; 11.77B of text (keras-hub's preset gemma3_instruct_12b_text) and 0.42B of vision
    "gemma3-12b-dpo": (
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
                "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 262208,
                "sliding_window": 1024,
            },
            "vision_config": {
                "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
                "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
                "vision_use_head": False,
            },
        },
        # 48 layers · r = 16 · (q 3840 + 4096, k and v 3840 + 2048, o 4096 + 3840, gate, up and down 3840 + 15360)
        48 * 16 * (2 * 7936 + 2 * 5888 + 3 * 19200),
        12.2,
    ),
    # mistralai/Mistral-Small-24B-Instruct-2501 and its card: 23.6B
    "mistral-small-24b-dpo": (
        {
            "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
            "sliding_window": None, "tie_word_embeddings": False,
        },
        # 40 layers · r = 16 · (q 5120 + 4096, k and v 5120 + 1024, o 4096 + 5120, gate, up and down 5120 + 32768)
        40 * 16 * (2 * 9216 + 2 * 6144 + 3 * 37888),
        23.6,
    ),
    # openai/gpt-oss-20b and its card (arXiv 2508.10925): 20.9B
    "gpt-oss-20b-dpo": (
        {
            "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
            "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "tie_word_embeddings": False,
        },
        # 24 layers · r = 8 · (q 2880 + 4096, k and v 2880 + 512, o 4096 + 2880, and of 32 experts gate and up
        # 2880 + 5760, down 2880 + 2880)
        24 * 8 * (2 * 6976 + 2 * 3392 + 32 * (8640 + 5760)),
        20.9,
    ),
}  # fmt: skip
"""Recipe → what its base's config.json says of sizes, the values that its LoRA trains, and its parameters in billions."""


@pytest.mark.parametrize("name", PUBLIC_SIZES)
def test_the_memory_in_a_recipes_head_is_what_the_plan_says(name, tmp_path):
    sizes, trained, billions = PUBLIC_SIZES[name]
    (tmp_path / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    text = (ROOT / f"recipes/{name}.yaml").read_text(encoding="utf-8")
    head = " ".join(line.removeprefix("#").strip() for line in text.split("base_model:")[0].splitlines())
    load, step = re.search(r"planned are (\d+) GiB while it is loaded and (\d+) GiB in a step", head).groups()
    memory = int(re.search(r"--gpus 1 --gpu-memory (\d+)", head)[1])
    cfg = yaml.safe_load(text) | {"base_model": str(tmp_path)}
    planner = Planner(cfg, name, Machine(gpus=1, gpu=memory * GIB, host=64 * GIB))
    own, found = planner.verdict("ddp"), planner.model(cfg).sizes
    assert own["fits"]
    assert round(own["load_gib"]) == int(load)
    # The head says the most: experts' backward takes 1.0 and 1.2 GiB less in transformers 5.20 than in 5.16.
    less = name in ("qwen3-30b-a3b-dpo", "gpt-oss-20b-dpo") and Version(version("transformers")) >= Version("5.20")
    assert round(own["step_gib"]) == int(step) - less
    assert found.trained == trained
    assert round((sum(found.linear) + sum(found.other)) / 1e9, 1) == billions


@pytest.mark.parametrize("name", ["qwen72b-dpo", "qwen72b-dpo-fsdp", "qwen72b-dpo-24gb", "qwen72b-dpo-2x48gb"])
def test_the_memory_in_a_72b_recipes_head_is_what_the_plan_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "config.json").write_text(json.dumps(bases_of.QWEN72B), encoding="utf-8")
    text = (ROOT / f"recipes/{name}.yaml").read_text(encoding="utf-8")
    head = " ".join(line.removeprefix("#").strip() for line in text.split("base_model:")[0].splitlines())
    load, step = re.search(r"planned are (\d+) GiB while it is loaded and (\d+) GiB in a step", head).groups()
    gpus, memory = re.search(rf"plan recipes/{name}.yaml --gpus (\d) --gpu-memory ([\d.]+)", head).groups()
    cfg = yaml.safe_load(text) | {"base_model": str(tmp_path)}
    planner = Planner(cfg, name, Machine(gpus=int(gpus), gpu=round(float(memory) * GIB), host=128 * GIB))
    own = planner.verdict(planner.used)
    assert own["fits"]
    assert (round(own["load_gib"]), round(own["step_gib"])) == (int(load), int(step))
    assert f"{planner.copy_bytes() / GIB:.1f} GiB on disk" in head
    assert not (cfg.get("fsdp_config") or {}).get("cpu_ram_efficient_loading")
    if name == "qwen72b-dpo-24gb":
        planner.machine = Machine(gpus=8, gpu=planner.machine.gpu, host=128 * GIB)
        longer = planner.need("fsdp2", {**cfg, "sequence_len": 2048})
        assert longer.limit(planner.machine) is None
        assert round(longer.step / GIB) == int(re.search(r"2048 then fits, (\d+) GiB in a step", head)[1])


@pytest.mark.parametrize(
    ("name", "like", "keys"),
    [
        ("-24gb", "-fsdp", {"output_dir", "gradient_accumulation_steps", "sequence_len"}),
        ("-2x48gb", "", {"output_dir", "gradient_accumulation_steps"}),
    ],
)
def test_a_72b_recipe_for_small_cards_differs_as_its_head_says(name, like, keys):
    ours, theirs = (
        yaml.safe_load((ROOT / f"recipes/qwen72b-dpo{one}.yaml").read_text(encoding="utf-8")) for one in (name, like)
    )
    assert {key for key in ours | theirs if ours.get(key) != theirs.get(key)} == keys
    gpus = {"-24gb": 4, "-2x48gb": 2}[name]
    assert ours["gradient_accumulation_steps"] * gpus == theirs["gradient_accumulation_steps"] * 8 == 128


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
