"""Planned memory against numbers derived by hand, and what is refused before a weight is read."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_plugin.compute import attention
from dpo_plugin.compute.gradient_checkpointing import saved_bytes_per_token
from dpo_plugin.config import ReferenceConfig
from dpo_plugin.engines.config import SHIPPED, EngineSettings
from dpo_plugin.errors import ConfigError, UnknownNameError
from dpo_plugin.host.commands.cli import dpo
from dpo_plugin.host.yaml_keys import read_yaml, typed
from dpo_plugin.model.adapters import POLICY, REFERENCE
from dpo_plugin.plan import engines as sharding
from dpo_plugin.plan.activations import LiveBytes, PlannedModel, Step, run_on_fakes
from dpo_plugin.plan.engines import PlanInput, Zero3
from dpo_plugin.plan.inputs import SHIPPED_ZERO3, adapter_configs, zero3_settings
from dpo_plugin.plan.planner import CONTEXT, GIB, Machine, Planner, make_plan
from dpo_plugin.plan.sizes import Sizes, on_meta
from dpo_plugin.plan.table import OFFLOADED, plan_report
from tests.support.architectures import make_config
from tests.support.tiny import EXPERTS, PROJECTIONS, ROOT, moe_config

SMALL = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "pad_token_id": 0,
}
QWEN72B = {
    **SMALL,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
}
LORA = LoraConfig(r=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
STEP = Step(pairs=1, length=32, checkpointed=False, attention=attention.NAME)
# Two linear weights, an embedding and a norm, and two adapters of two parameters each.
HAND = Sizes((65536, 65536), 512, (1000, 3000), (512, 512), (256, 256), 2, 65536, 500, "Layer")
QLORA = PlanInput(ranks=4, bits=4)


def small_model(adapters: bool = True, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> PlannedModel:
    config = {**SMALL, **settings}
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    return PlannedModel(config, {POLICY: LORA, REFERENCE: LORA} if adapters else {}, dtype)


# ── parameters ──


def test_the_72b_shape_has_the_published_number_of_trainable_parameters():
    """LoRA r on (in, out) has r (in + out) values: 16 · [2 (8192 + 8192) + 2 (8192 + 1024) + 3 (8192 + 29568)] · 80.

    Linear layers: 80 · [2 · 8192² + 2 · 8192 · 1024 + 3 · 8192 · 29568]. Others: embedding and head of 152064 · 8192,
    161 norms of 8192, and biases of q, k, v, 80 · (8192 + 2 · 1024).
    NF4 with double quantisation: half a byte a weight, a byte per 64 and 4 bytes per 64 · 256.
    """
    sizes = small_model(**QWEN72B).sizes
    assert sizes.trained == sum(sizes.reference) == 210_534_400
    assert sum(sizes.linear) == 70_212_648_960
    assert sum(sizes.other) == 2 * 152064 * 8192 + 161 * 8192 + 80 * 10240
    assert (sizes.layers, sizes.layer_class) == (80, "Qwen2DecoderLayer")
    assert sizes.layer_linear * 80 == sum(sizes.linear)
    assert sharding.linear_bytes(sizes, QLORA) == (35_106_324_480, 1_097_072_640 + 17_141_760)
    assert sharding.linear_bytes(sizes, replace(QLORA, double_quant=False))[1] == 4 * 1_097_072_640


def test_a_tied_head_is_counted_once():
    untied, tied = (small_model(tie_word_embeddings=tie).sizes for tie in (False, True))
    assert sum(untied.other) - sum(tied.other) == 512 * 64
    assert sum(untied.linear) == sum(tied.linear)


def test_counts_are_those_of_the_real_model():
    config = dict(SMALL)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    sizes = small_model(adapters=False).sizes
    assert sum(sizes.linear) + sum(sizes.other) == sizes.trained == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        # 2 layers · 4 experts · r = 8 · ((hidden 64 + gate and up 96) + (48 + 64))
        ({"target_modules": [], "target_parameters": EXPERTS}, 17_408),
        ({"target_modules": [], "target_parameters": [f"model.layers.1.{name}" for name in EXPERTS]}, 8_704),
        # axolotl's lora_target_linear: q and o (64, 64), k and v (64, 32), and no expert
        ({"target_modules": "all-linear"}, 2 * 8 * (2 * 128 + 2 * 96)),
    ],
)
def test_adapters_on_experts_are_counted_and_take_activations(settings, trained):
    lora = LoraConfig(r=8, task_type="CAUSAL_LM", **settings)
    model = PlannedModel(moe_config("qwen3_moe"), {POLICY: lora, REFERENCE: lora}, torch.bfloat16)
    assert model.sizes.trained == sum(model.sizes.reference) == trained
    base = PlannedModel(moe_config("qwen3_moe"), {}, torch.bfloat16).sizes
    assert (model.sizes.linear, model.sizes.other) == (base.linear, base.other)
    assert model.activations(replace(STEP, attention="sdpa")).backward > 0
    with pytest.raises(ConfigError, match="qwen3_moe model in torch.float32 cannot be planned.*Write: bf16: true"):
        PlannedModel(moe_config("qwen3_moe"), {POLICY: lora}, torch.float32).activations(
            replace(STEP, attention="sdpa")
        )


def test_experts_in_four_bits_are_quantised_weights():
    """Per layer: q and o (64, 64), k and v (64, 32); 4 experts of (2 · 48, 64) and (64, 48), 73,728 values.

    In 4 bits a value is half a byte, and 64 of them have a byte of scale, 64 · 256 another 4 bytes. A layer's experts
    are in full at a time, or those of both layers where none runs again.
    """
    plain, four = (
        PlannedModel(moe_config("qwen3_moe"), {POLICY: LORA}, torch.bfloat16, four_bit_experts=four).sizes
        for four in (False, True)
    )
    attention_values, experts = 2 * (2 * 64 * 64 + 2 * 64 * 32), 2 * 4 * (96 * 64 + 64 * 48)
    assert (sum(plain.linear), sum(four.linear)) == (attention_values, attention_values + experts)
    assert sum(plain.other) - sum(four.other) == experts
    assert (plain.layer_experts, four.layer_experts) == (0, 36_864)
    assert four.layer_linear - plain.layer_linear == plain.layer_other - four.layer_other == 36_864
    assert four.rows - plain.rows == 2 * 4 * (96 + 64)
    weights, states = sharding.linear_bytes(four, QLORA)
    assert weights == (attention_values + experts) // 2
    assert states - sharding.linear_bytes(plain, QLORA)[1] == experts // 64 + 4 * 2 * (2 + 1)
    assert sharding.one_in_full(four, QLORA) == 2 * 36_864
    assert sharding.one_in_full(four, replace(QLORA, checkpointed=False)) == 2 * 2 * 36_864
    assert sharding.one_in_full(plain, QLORA) == 2 * 64 * 64
    saved = (
        sharding.zero3(plain, QLORA, Zero3(persistence=0)).parts,
        sharding.zero3(four, QLORA, Zero3(persistence=0)).parts,
    )
    assert saved[0]["base weights"] - saved[1]["base weights"] == experts * 2 // 4 - experts // 2 // 4 - (
        experts // 64 + 24
    )


def test_the_yaml_asks_for_experts_in_four_bits(tmp_path):
    folder = tmp_path / "moe"
    moe_config("qwen3_moe").save_pretrained(folder)
    cfg = {"rl": "dpo", "base_model": str(folder), "adapter": "qlora", "load_in_4bit": True, "bf16": True, "lora_r": 8}
    cfg |= {"lora_target_modules": ["q_proj"], "gradient_checkpointing": True}
    models = [
        Planner({**cfg, "quantize_moe_experts": four}, "x.yaml", Machine(2, 80 * GIB, 64 * GIB))
        for four in (False, True)
    ]
    assert [one.model(one.cfg).sizes.layer_experts for one in models] == [0, 36_864]


def test_the_yaml_of_an_adapter_on_experts():
    cfg = {"adapter": "lora", "lora_r": 8, "lora_target_parameters": EXPERTS}
    [planned] = adapter_configs(cfg, ReferenceConfig()).values()
    assert (planned.r, planned.target_modules, planned.target_parameters) == (8, set(), EXPERTS)
    model = {POLICY: LoraConfig(r=8, target_modules=[], target_parameters=["mlp.experts.nothing"])}
    with pytest.raises(
        ConfigError, match=r"`lora_target_parameters` has 'mlp.experts.nothing'.*Write: lora_target_par"
    ):
        PlannedModel(moe_config("qwen3_moe"), model, torch.bfloat16)


# ── activations ──


def test_live_bytes_are_those_of_storages_that_live():
    """a: 4000 bytes; b = 2a: 4000 more; the view none; after b is gone, c of 400 bytes."""
    with LiveBytes([]) as seen:
        a = torch.ones(1000)
        b = a * 2
        view = b[:10]
        assert (seen.live, seen.peak) == (8000, 8000)
        del b, view
        c = torch.ones(100)
        assert (seen.live, seen.peak) == (4400, 8000)
        assert seen.restart() == 8000
        assert seen.peak == 4400
    del a, c


def test_a_checkpointed_layer_keeps_its_input_alone():
    """A pair that shares one token has 2 · 32 − 1 tokens; its rows of 64 values have 2 bytes each in bf16."""
    model, step = small_model(), replace(STEP, checkpointed=True)
    assert model.at_depth(step, 5).kept - model.at_depth(step, 4).kept == 63 * 64 * 2
    assert model.activations(replace(step, pairs=3)).kept > 2.9 * model.activations(step).kept


def test_a_whole_layer_keeps_what_a_real_one_saves():
    """Against tensors that autograd packs in a real layer of the same shape: 64 tokens in two rows, fp32.

    The attention's output counts once more, 64 values a token: as a fake tensor it lies in the order of its heads, so
    that transformers' ``contiguous`` makes a copy, which the real kernel's order spares.
    """
    config = dict(SMALL)
    real = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    saved = saved_bytes_per_token(real.model.layers[0], real.config, "cpu", tokens=32)
    model, step = small_model(adapters=False, dtype=torch.float32), replace(STEP, attention="sdpa")
    assert model.at_depth(step, 4).kept - model.at_depth(step, 3).kept == 64 * (saved + 64 * 4)


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_two_depths_tell_every_other(adapters, checkpointed):
    step = replace(STEP, checkpointed=checkpointed, autocast=True, fp32_adapters=True)
    model = small_model(adapters)
    assert model.activations(step) == model.at_depth(step, 5)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_base_that_sees_is_cut_to_two_depths_and_has_every_kind_of_layer(checkpointed):
    """Against the whole model, run uncut: as in Gemma 3, five layers with a window to each that attends to all.

    What a layer keeps of its window, a thousandth here, is counted for the second that has none, too.
    """
    kinds = [*["sliding_attention"] * 5, "full_attention", "sliding_attention", "full_attention"]
    text = {**SMALL, "num_hidden_layers": len(kinds), "head_dim": 16, "sliding_window": 8, "layer_types": kinds}
    sight = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text.pop("model_type")
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=sight)
    step = replace(STEP, checkpointed=checkpointed)
    model = PlannedModel(config, {POLICY: LORA, REFERENCE: LORA}, torch.bfloat16)
    whole = run_on_fakes(on_meta(config, model.adapters, model.dtype), step)
    assert model.at_depth(step, 2).kept < model.at_depth(step, 3).kept < whole.kept
    found = model.activations(step)
    assert found.kept == pytest.approx(whole.kept, rel=0 if checkpointed else 2e-3)
    assert replace(found, kept=whole.kept) == whole


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        ("lfm2", ["conv", "full_attention"]),
        ("gemma4_text", ["sliding_attention", "full_attention"]),  # whose heads are wider at given places
        ("jamba", None),  # whose kinds follow from other keys
    ],
)
def test_layers_of_several_kinds_are_planned_for_the_whole_and_never_for_less(kind, kinds):
    """Against the whole model, run uncut: 0.1 to 15 % more, since what the widest kind takes is counted for each."""
    config = make_config(kind, num_hidden_layers=6, **({"layer_types": kinds * 3} if kinds else {}))
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    step = replace(STEP, checkpointed=True, attention="sdpa")
    model = PlannedModel(config, {POLICY: lora, REFERENCE: lora}, torch.bfloat16)
    found, whole = model.activations(step), run_on_fakes(on_meta(config, model.adapters, model.dtype), step)
    assert found.kept == whole.kept
    assert whole.forward <= found.forward <= 1.02 * whole.forward
    assert whole.backward <= found.backward <= 1.16 * whole.backward


def test_models_of_one_shape_are_measured_once(tmp_path):
    """Wherever they lie, and after the first was built, which writes into the config that transformers is given."""
    first, second = (planner(folder, NODE) for folder in (tmp_path, tmp_path / "other"))
    assert first.model(first.cfg) is first.model(first.cfg) is second.model(second.cfg)
    wider = planner(tmp_path, NODE, {**SMALL, "intermediate_size": 192})
    assert wider.model(wider.cfg) is not first.model(first.cfg)


def test_scoring_takes_two_and_a_half_times_a_chunk_of_fp32_logits():
    """Per value of a chunk in bf16: logits 2 bytes, their fp32 copy 4, the gradient 2, and 2 of the chunk before.

    So with 64 completion tokens, 16 more rows of 512 values take 16 · 512 · 10 bytes more, less the 16 hidden rows of
    64 · 2 bytes that smaller chunks have already left behind when the last begins.
    """
    model, step = small_model(), replace(STEP, length=33)
    few, more = (model.at_depth(replace(step, chunk=chunk), 2).loss for chunk in (16, 32))
    assert more - few == pytest.approx(16 * 512 * 10 - 16 * 64 * 2, rel=0.01)
    assert few < 64 * 512 * 4, "less than the fp32 logits of all completion tokens"


def test_fp32_adapters_under_autocast_keep_more():
    model = small_model()
    narrow, wide = model.activations(STEP), model.activations(replace(STEP, autocast=True, fp32_adapters=True))
    assert wide.kept > narrow.kept


# ── engines ──


def test_ddp_by_hand():
    """4 bit: 65536 bytes packed, 2048 blocks of 64 with a byte each and 8 groups of 256 blocks with 4: 2080.

    Others 4000 · 2. Policy 1024 and reference 512 values of 4 bytes; gradients 1024 · 4, AdamW 1024 · 8; with more than
    one rank DDP's buckets 1024 · 4. Loading: quantising holds 65536 · 2 in full, more than the others in fp32 would add.
    """
    held = sharding.ddp(HAND, QLORA)
    assert held.parts == {
        "base weights": 65536 + 2080 + 8000,
        "reference model": 0,
        "adapters": 4 * 1536,
        "gradients": 4096,
        "optimizer": 8192,
        "communication": 4096,
        "weight in full": 131072,
    }
    assert held.load == 75616 + 131072
    assert sharding.ddp(HAND, replace(QLORA, ranks=1)).parts["communication"] == 0


def test_zero3_by_hand():
    """Packed in bf16, 131072 weights of 4 bits are 32768 elements: 2 · (32768 + 4000) bytes, a quarter on each rank.

    Whole beside that: quantisation states 2080, the parameter of 1000 values (2000 bytes), and all adapters, 1536 · 2,
    none of which is above the threshold. Trained here: 256 values, with fp32 master 4, AdamW 8, gradient 2 and, for the
    sub-group of 100 values, 4 bytes. Gathered: the largest, 16384 elements, and a prefetch of 100, 2 bytes each; the
    bucket of 200 values and its copy.
    """
    zero = Zero3(persistence=1000, prefetch=100, bucket=200, live=10_000, reuse=10_000, sub_group=100)
    held = sharding.zero3(HAND, QLORA, zero)
    assert held.parts == {
        "base weights": 18384 + 2000 + 2080,
        "reference model": 0,
        "adapters": 768 + 3072,
        "master weights": 1024,
        "gradients": 512 + 400,
        "optimizer": 2048,
        "communication": 2 * 16484 + 2 * 400,
        "weight in full": 131072,
    }
    assert held.load == sharding.ddp(HAND, QLORA).load, "transformers loads quantised models whole on every rank"
    assert held.host == 0


def test_offload_moves_partitions_to_the_host():
    """Of each of 4 ranks: 18384 of the base, 768 of adapters; master 1024, gradients 912, AdamW 2048."""
    zero = Zero3(persistence=1000, sub_group=100, offload_parameters=True, offload_optimizer=True)
    held = sharding.zero3(HAND, QLORA, zero)
    assert held.host == 4 * (18384 + 768 + 1024 + 912 + 2048)
    assert held.parts["base weights"] == 2000 + 2080
    assert held.parts["optimizer"] == held.parts["gradients"] == held.parts["master weights"] == 0
    assert held.load == sharding.ddp(HAND, QLORA).load, "offload does not help while loading"


def test_zero3_partitions_a_model_that_is_not_quantised_while_it_loads():
    """131072 + 4000 values of 2 bytes over 4 ranks, one weight gathered twice, adapters in fp32."""
    assert sharding.zero3(HAND, PlanInput(ranks=4), Zero3()).load == 67536 + 2 * 2 * 65536 + 4 * 1536


def test_fsdp2_by_hand():
    """A quarter of 65536 + 8000 bytes, and 2080 whole. In no layer: 3000 values; a layer: half of the packed weights,
    500 values and half of the reference adapter, 256 values of 2 bytes; three layers at once.
    """
    held = sharding.fsdp2(HAND, QLORA, offload=False, one_rank_loads=False)
    assert held.parts == {
        "base weights": 18384 + 2080,
        "reference model": 0,
        "adapters": (4096 + 1024) // 4,
        "gradients": 1024,
        "optimizer": 2048,
        "communication": 6000 + 3 * (32768 + 1000 + 512),
        "weight in full": 131072,
    }
    assert held.load == 75616 + 131072
    moved = sharding.fsdp2(HAND, QLORA, offload=True, one_rank_loads=False)
    assert moved.parts["base weights"] == 2080
    assert moved.host == 73536 + 4096 + 1024 + 4 * (1024 + 2048)


def test_fsdp2_without_quantisation_reads_once_or_on_every_rank():
    once, everywhere = (sharding.fsdp2(HAND, PlanInput(ranks=4), False, loads).host for loads in (True, False))
    assert (once, everywhere) == (270144, 4 * 270144)


def test_full_fine_tuning_holds_a_second_model():
    """bf16: 131072 · 2, and 4000 values that axolotl leaves in fp32; AdamW twice the weights' bytes."""
    full = replace(HAND, policy=(), reference=())
    held = sharding.ddp(full, PlanInput(ranks=1, stays_fp32=True, second_model=True))
    weights = 262144 + 16000
    assert [held.parts[part] for part in ("base weights", "reference model", "gradients")] == [weights] * 3
    assert held.parts["optimizer"] == 2 * weights
    assert held.load == 2 * weights - 8000 + 4000 * 2 + 3000 * 2


def test_full_fine_tuning_in_bf16_updates_fp32_master_weights():
    """135072 values of 2 bytes, which make up each of both models and the gradients; masters of 4, AdamW's states of 8.

    In the step gradients become 4 bytes, 2 more, and without a fused optimizer a state of 4 is copied. FSDP2 on 4 ranks
    holds the policy in fp32, gradients too, and gathers in bf16: 3000 values in no layer, three times, and five layers of
    65536 and 500.
    """
    full, given = replace(HAND, policy=(), reference=()), PlanInput(ranks=1, stays_fp32=True, second_model=True)
    stock, held = sharding.ddp(full, given), sharding.ddp(full, replace(given, masters=True))
    values = 135072
    assert [held.parts[part] for part in ("base weights", "reference model", "gradients")] == [2 * values] * 3
    assert (held.parts["master weights"], held.parts["optimizer"]) == (4 * values, 8 * values)
    assert held.update == 2 * values + 4 * values
    assert sharding.ddp(full, replace(given, masters=True, fused=True)).update == 2 * values
    assert held.load == stock.load, "the host loads both models as ever"
    given = PlanInput(ranks=4, masters=True, second_model=True)
    sharded = sharding.fsdp2(full, given, offload=False, one_rank_loads=False)
    assert [sharded.parts[part] for part in ("base weights", "reference model")] == [values, values // 2]
    assert [sharded.parts[part] for part in ("gradients", "optimizer")] == [values, 2 * values]
    assert sharded.parts["communication"] == 3 * 6000 + 5 * (131072 + 1000)
    assert sharded.load == values + values // 2 + 2 * 4 * 65536
    assert sharded.host == 4 * 4 * values


def test_master_weights_are_planned_where_a_run_has_them(tmp_path):
    full = dict.fromkeys(("adapter", "load_in_4bit", "lora_r", "lora_target_modules", "lora_model_dir"))

    def masters(column, **settings):
        made = planner(tmp_path, **{**full, "bf16": True, **settings})
        return made.need(column, made.cfg).parts.get("master weights", 0)

    assert masters("ddp") == 4 * planner(tmp_path, **full).model({"bf16": True}).sizes.trained
    assert masters("ddp", dpo_plugin={"compute": {"master_weights": False}}) == masters("ddp", bf16=False) == 0
    assert planner(tmp_path).need("ddp", planner(tmp_path).cfg).parts.get("master weights", 0) == 0


def test_eight_bit_optimizer_states():
    run = replace(QLORA, moments=2.03125)
    assert sharding.ddp(HAND, run).parts["optimizer"] == 2080


# ── the command ──


def config_file(folder: Path, shape: dict[str, Any] | None = None, **settings: Any) -> str:
    (folder / "base").mkdir(parents=True, exist_ok=True)
    (folder / "base/config.json").write_text(json.dumps(shape or SMALL))
    common = {
        "base_model": str(folder / "base"),
        "plugins": ["dpo_plugin.DPOPlugin"],
        "rl": "dpo",
        "adapter": "qlora",
        "load_in_4bit": True,
        "lora_r": 16,
        "lora_target_modules": PROJECTIONS,
        "lora_model_dir": str(folder / "sft"),
        "bf16": True,
        "gradient_checkpointing": True,
        "sequence_len": 64,
    }
    kept = {key: value for key, value in {**common, **settings}.items() if value is not None}
    (folder / "config.yaml").write_text(yaml.safe_dump(kept))
    return str(folder / "config.yaml")


NODE = Machine(8, 80 * GIB, 640 * GIB)


def planner(folder: Path, machine: Machine = NODE, *shape: Any, **settings: Any) -> Planner:
    file = config_file(folder, *shape, **settings)
    return Planner(yaml.safe_load(Path(file).read_text()), file, machine)


def zero_file(folder: Path, **zero: Any) -> str:
    content = {"zero_optimization": {"stage": 3, **zero}, "bf16": {"enabled": True}}
    (folder / "zero.json").write_text(json.dumps(content))
    return str(folder / "zero.json")


def test_the_72b_recipe(tmp_path):
    recipe = yaml.safe_load((ROOT / "recipes/qwen72b-dpo.yaml").read_text(encoding="utf-8"))
    recipe["deepspeed"] = str(ROOT / recipe["deepspeed"])
    file = config_file(tmp_path, QWEN72B, **{key: value for key, value in recipe.items() if key != "base_model"})
    arguments = ["plan", file, "--gpus", "8", "--gpu-memory", "80", "--host-memory", "1000", "--json"]
    done = CliRunner().invoke(dpo, arguments)
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    zero = plan["engines"]["zero3"]
    assert plan["engine"] == "zero3"
    assert plan["trained_parameters"] == 210_534_400
    assert plan["tokens_per_forward"] == 4096
    assert all(found["fits"] for found in plan["engines"].values())
    others, embedding, states = 2_493_554_688, 152064 * 8192, 1_097_072_640 + 17_141_760
    weights, adapters = 70_212_648_960 // 2 + 2 * others, 2 * 210_534_400
    # an eighth of the 4-bit model; whole: block maxima, biases and norms, adapters in fp32 and twice the embeddings
    small = 2 * (161 * 8192 + 80 * 10240)
    load = weights // 8 + states + small + 4 * adapters + 2 * 2 * embedding + CONTEXT
    assert zero["load_gib"] == pytest.approx(load / GIB, abs=2e-3)
    assert plan["copy_on_disk_gib"] == pytest.approx((weights + states) / GIB, abs=1e-3)
    assert any("takes 38.4 GiB on disk" in note for note in plan["notes"])
    # DDP loads the whole model, its embeddings, head and norms in fp32 for a moment
    whole = weights + states + 2 * others + 2 * embedding + CONTEXT
    assert plan["engines"]["ddp"]["load_gib"] == pytest.approx(whole / GIB, abs=2e-3)
    for found in plan["engines"].values():
        assert found["load_gib"] == pytest.approx(sum(found["load_parts_gib"].values()), abs=0.01)
    assert zero["step_gib"] == pytest.approx(sum(zero["parts_gib"].values()), abs=0.01)
    assert zero["recipe"] == []


def test_the_settings_of_the_shipped_json():
    assert zero3_settings(EngineSettings.read({"deepspeed": str(ROOT / SHIPPED)}), "zero3", 8192, 2) == SHIPPED_ZERO3


def test_auto_values_are_those_that_transformers_fills_in(tmp_path):
    keys = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    file = zero_file(tmp_path, **dict.fromkeys(keys, "auto"))
    found = zero3_settings(EngineSettings.read({"deepspeed": file}), "zero3", 100, 2)
    assert (found.bucket, found.prefetch, found.persistence) == (10_000, 9_000, 1_000)


def test_the_report_marks_the_engine_and_names_every_other(tmp_path):
    done = CliRunner().invoke(dpo, ["plan", config_file(tmp_path), "--gpus", "1", "--gpu-memory", "80"])
    assert done.exit_code == 0, done.output
    assert "DDP (this config) fits" in done.output
    assert all(name in done.output for name in ("ZeRO-3 ", "ZeRO-3 + CPU", "FSDP2", "sft` is not here"))


def test_the_report_says_how_to_get_a_deepspeed_json_that_is_not_here(tmp_path, monkeypatch):
    arguments = ["plan", config_file(tmp_path), "--gpus", "2", "--gpu-memory", "80"]
    monkeypatch.chdir(ROOT)
    assert "which is not here." not in CliRunner().invoke(dpo, arguments).output
    monkeypatch.chdir(tmp_path)
    for file in (SHIPPED, OFFLOADED):
        said = CliRunner().invoke(dpo, arguments).output
        line = f"axolotl dpo recipes {file} --copy . writes {file}, which is not here."
        assert line in said
        assert CliRunner().invoke(dpo, line.partition("axolotl dpo ")[2].partition(" writes")[0].split()).exit_code == 0
    assert "which is not here." not in CliRunner().invoke(dpo, arguments).output


def test_the_report_says_of_what_there_is_too_little(tmp_path):
    (found,) = (
        line
        for line in plan_report(plan_of(config_file(tmp_path), 2, 80, 3))
        if isinstance(line, str) and line.startswith("DDP")
    )
    assert found.startswith("DDP (this config) does not fit: host, all ranks 4.0 of 3.0 GiB. None of the changes")


@pytest.mark.parametrize(("tenths", "keys"), [(19, {"gradient_checkpointing", "micro_batch_size"}), (15, None)])
def test_what_is_proposed_fits_when_it_is_written(tmp_path, tenths, keys):
    """The proposed keys are written into the YAML and planned again; less than CUDA's context is never enough."""
    shape = {**SMALL, "hidden_size": 256, "vocab_size": 4096}
    settings = {"adapter": "lora", "load_in_4bit": None, "gradient_checkpointing": None, "sequence_len": 2048}
    made = planner(tmp_path, Machine(2, tenths * GIB // 10, 64 * GIB), shape, micro_batch_size=8, **settings)
    assert made.need("ddp", made.cfg).limit(made.machine)
    change = made.change("ddp")
    assert change is None if keys is None else set(change) == keys
    if change is not None:
        again = planner(tmp_path, made.machine, shape, **{**settings, **change})
        assert again.need("ddp", again.cfg).limit(made.machine) is None


def test_a_whole_quantised_model_that_does_not_load_is_sharded_instead(tmp_path):
    """36 GiB of CUDA context and model: no 4-bit load of 72B, but a bf16 one that ZeRO-3 partitions as it is read.

    Code that is not the library's keeps the base from being loaded in parts.
    """
    whole = {"trust_remote_code": True}
    made = planner(tmp_path, Machine(8, 36 * GIB, 2000 * GIB), QWEN72B, **whole)
    assert made.need("zero3", made.cfg).limit(made.machine) == "load"
    assert made.change("zero3") == {"adapter": "lora", "load_in_4bit": False}
    assert made.change("ddp") is None
    larger = planner(tmp_path, replace(made.machine, gpu=44 * GIB), QWEN72B, **whole)
    assert larger.change("zero3") == {"embeddings_skip_upcast": True}


@pytest.mark.parametrize(
    "settings", [{}, {"adapter": "lora", "load_in_4bit": False}, {"adapter": None, "load_in_4bit": False}]
)
def test_another_engines_lines_are_yaml_that_is_planned_as_that_engine(tmp_path, settings):
    made = planner(tmp_path, **settings)
    found = made.verdict("fsdp2")
    lines = yaml.safe_load("\n".join(found["recipe"]))
    assert lines["fsdp_version"] == 2
    assert lines["fsdp_config"]["transformer_layer_cls_to_wrap"] == "Qwen2DecoderLayer"
    again = planner(tmp_path, **settings, **lines)
    assert again.used == "fsdp2"
    assert again.verdict("fsdp2")["parts_gib"] == found["parts_gib"]
    assert again.verdict("ddp")["recipe"] == ["fsdp_config: null", "fsdp_version: null"]


def test_an_adapter_that_is_there_tells_its_own_shape(tmp_path):
    LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path / "sft")
    made = planner(tmp_path, lora_r=None, lora_target_modules=None)
    assert made.model(made.cfg).sizes.trained == 5 * 4 * (64 + 64)


@pytest.mark.parametrize(("strategy", "attached"), [(None, True), ("ema", True), ("base", False), ("none", False)])
def test_the_reference_strategy_decides_about_the_second_adapter(tmp_path, strategy, attached):
    made = planner(tmp_path, dpo_plugin={"reference": {"strategy": strategy}})
    assert (REFERENCE in adapter_configs(made.cfg, made.reference)) == attached


def test_max_tokens_and_checkpointed_layers_bound_activations(tmp_path):
    """A fourth of the pairs keeps a fourth, but for SDPA's mask of rejected, a byte for each of 255 · 256 places."""

    def activations(**compute):
        made = planner(tmp_path, micro_batch_size=4, sequence_len=256, dpo_plugin={"compute": compute})
        return made.need("zero3", made.cfg).parts["activations"]

    every, mask = activations(), 255 * 256
    assert activations(max_tokens=512) == pytest.approx((every - mask) / 4 + mask, rel=1e-3)
    assert every < activations(checkpoint_layers=3) < activations(checkpoint_layers=0)


def test_full_fine_tuning_is_planned_and_a_lora_proposed(tmp_path):
    shape = {**SMALL, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    nothing = dict.fromkeys(("adapter", "load_in_4bit", "lora_r", "lora_target_modules", "lora_model_dir"))
    made = planner(tmp_path, Machine(1, 4 * GIB, 64 * GIB), shape, **nothing)
    parts = made.need("ddp", made.cfg).parts
    assert parts["reference model"] == parts["base weights"] == parts["gradients"] > 0.7 * GIB
    assert made.change("ddp")["adapter"] == "qlora"


WRONG = [
    ({"plugins": None}, "plugins:"),
    ({"rl": "kto"}, "rl:"),
    ({"adapter": "lora"}, "load_in_4bit"),
    ({"adapter": "llama-adapter"}, "adapter: lora"),
    ({"deepspeed": "zero", "fsdp_config": {"version": 2}}, "`deepspeed` and `fsdp_config` are both set"),
    ({"deepspeed": "zero", "adapter": "lora", "load_in_4bit": False, "load_in_8bit": True}, "load_in_8bit"),
    ({"deepspeed": "missing.json"}, "missing.json` does not exist"),
    ({"deepspeed": "config.yaml"}, "is not valid JSON"),
    ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "stage 2"),
    ({"fsdp_version": 1, "fsdp_config": {"offload_params": False}}, "fsdp_version"),
    ({"fsdp_version": 2, "fsdp_config": {"cpu_ram_efficient_loading": True}}, "cpu_ram_efficient_loading: false"),
    ({"base_model": "recipes"}, "holds no config.json"),
    ({"base_model": "nobody/no-such-model"}, "nobody/no-such-model"),
    ({"lora_target_modules": ["q_proj", "query"]}, "'query'"),
    ({"lora_r": None}, "lora_r"),
    ({"dpo_plugin": {"compute": {"max_token": 3}}}, "max_tokens"),
]


@pytest.mark.parametrize(("settings", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_cannot_be_is_refused_and_the_key_named(tmp_path, monkeypatch, settings, words):
    file = config_file(tmp_path, **settings)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    with pytest.raises(ConfigError) as raised:
        plan_of(file, 8, 80)
    assert words in str(raised.value)
    assert "Write: " in str(raised.value)


def plan_of(file, *machine):
    return make_plan(typed(read_yaml(file)), file, *machine)


def test_a_model_whose_code_fails_without_data_is_refused_in_a_line(tmp_path):
    """Llama 4's experts, of which the adapters that `lora_target_linear` makes return a pair."""
    shape = make_config("llama4_text").to_dict()
    made = planner(tmp_path, NODE, shape, lora_target_linear=True, lora_target_modules=None)
    with pytest.raises(
        ConfigError, match=r"\(llama4_text\) does not run without data: .*Write: attn_implementation: eager"
    ):
        made.need("ddp", made.cfg)


def test_an_unknown_reference_strategy_is_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="adaptr"):
        plan_of(config_file(tmp_path, dpo_plugin={"reference": {"strategy": "adaptr"}}), 1, 80)


@pytest.mark.parametrize(
    ("gpus", "gib", "flag"), [(0, 80, "--gpus 0"), (-1, 80, "--gpus -1"), (1, 0, "--gpu-memory 0")]
)
def test_a_machine_without_gpus_is_refused(tmp_path, gpus, gib, flag):
    with pytest.raises(ConfigError, match=flag):
        plan_of(config_file(tmp_path), gpus, gib)


@pytest.mark.parametrize(("key", "host"), [("deepspeed", 0), ("fsdp_config.offload_params", 1)])
def test_offload_without_the_host_memory_for_it_is_refused(tmp_path, key, host):
    """Eight processes take 16 GiB of the host, and what is moved a little more."""
    deepspeed = {"deepspeed": zero_file(tmp_path, offload_param={"device": "cpu"})}
    fsdp = {"fsdp_version": 2, "fsdp_config": {"offload_params": True}}
    file = config_file(tmp_path, **(deepspeed if key == "deepspeed" else fsdp))
    with pytest.raises(ConfigError, match=rf"`{key}` moves .* --host-memory 17"):
        plan_of(file, 8, 80, host)
    assert plan_of(file, 8, 80, 100)["engine"] == ("zero3_offload" if key == "deepspeed" else "fsdp2")


def test_eight_bits_are_planned_where_they_can_be_held(tmp_path):
    plan = plan_of(config_file(tmp_path, adapter="lora", load_in_4bit=False, load_in_8bit=True), 1, 80)
    assert plan["engines"]["ddp"]["fits"]
    assert plan["engines"]["zero3"]["limit"] == "load_in_8bit"
    assert any("does not partition int8" in line for line in plan_report(plan) if isinstance(line, str))


def test_no_weight_is_read_and_none_is_made(tmp_path, monkeypatch):
    real = []
    before = nn.Parameter.__new__

    def spied(cls, data=None, requires_grad=True):
        if type(data) is torch.Tensor and data.device.type != "meta":
            real.append(tuple(data.shape))
        return before(cls, data, requires_grad)

    monkeypatch.setattr(nn.Parameter, "__new__", spied)
    made = planner(tmp_path)
    assert made.need("ddp", made.cfg).step > 0
    assert all(16 in shape for shape in real), "PEFT alone makes a LoRA weight before it goes to meta"
    nn.Parameter(torch.ones(3))
    assert (3,) in real, "the spy sees parameters"


def test_the_arithmetic_loads_neither_axolotl_nor_trl():
    code = "import sys, dpo_plugin.plan.planner; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"axolotl", "trl"} & set(done.stdout.split())


# ── loading in parts ──

PARTS = replace(QLORA, in_parts=True)


ROOMY = replace(HAND, linear=(16384,) * 8, other=(1000, 30000))
"""As `HAND`, in smaller weights and a larger embedding: 65536 + 62000 bytes and 2080 of states."""


def test_zero3_in_parts_by_hand():
    """The rank's 31884 + 2000 + 2080 of the step, both adapters in fp32, and twice the largest parameter, 60000 bytes."""
    zero = Zero3(persistence=1000)
    held = sharding.zero3(ROOMY, PARTS, zero)
    assert held.load_parts == {"base weights": 35964, "adapters": 4 * 1536, "transient": 2 * 60000}
    assert held.load == 35964 + 6144 + 120000
    assert held.host == 4 * 6144, "adapters in fp32 on every rank"
    assert held.parts == sharding.zero3(ROOMY, QLORA, zero).parts, "a step takes what it takes"
    moved = sharding.zero3(ROOMY, PARTS, replace(zero, offload_parameters=True))
    assert moved.load_parts == {**held.load_parts, "base weights": 2000 + 2080}
    assert moved.host == 4 * (31884 + 6144)


def test_fsdp2_in_parts_by_hand():
    """A quarter of 127536 and 2080 whole, a quarter of both adapters in fp32, and what is in no layer, 60000 bytes.

    Without it a layer is the most that is whole: half of the packed weights, 500 values, half of both adapters in fp32.
    """
    held = sharding.fsdp2(ROOMY, PARTS, offload=False, one_rank_loads=False)
    assert held.load_parts == {"base weights": 127536 // 4 + 2080, "adapters": 1536, "transient": 60000}
    assert held.host == 4 * 6144
    rootless = sharding.fsdp2(replace(ROOMY, other=(1000,)), PARTS, offload=False, one_rank_loads=False)
    assert rootless.load_parts["transient"] == 32768 + 1000 + 4 * 1536 // 2
    moved = sharding.fsdp2(ROOMY, PARTS, offload=True, one_rank_loads=False)
    assert moved.load_parts == {"base weights": 2080, "adapters": 0, "transient": 60000}
    assert moved.host == 127536 + 4 * 6144


@pytest.mark.parametrize("engine", [sharding.zero3, sharding.fsdp2])
def test_making_the_copy_counts_where_it_takes_more_than_loading_it(engine):
    """One weight of 65536 in bf16 and in 4 bits, with a byte for each of 1024 blocks and 4 for each of 4 groups."""
    settings = (Zero3(persistence=0),) if engine is sharding.zero3 else (False, False)
    assert engine(HAND, PARTS, *settings).load_parts == {"transient": 131072 + 32768 + 1024 + 16}


@pytest.mark.parametrize("column", ["zero3", "fsdp2"])
def test_a_72b_base_loads_onto_eight_gpus_of_24_gb(tmp_path, column):
    made = planner(tmp_path, Machine(8, 47 * GIB // 2, 640 * GIB), QWEN72B)
    assert made.need(column, made.cfg).load < 24 * GIB
    assert made.need(column, made.cfg).limit(made.machine) is None


@pytest.mark.parametrize("column", ["zero3", "zero3_offload", "fsdp2"])
def test_where_the_host_loads_the_base_every_gpu_holds_it_whole(tmp_path, column):
    made = planner(tmp_path, NODE, QWEN72B, dpo_plugin={"loading": "host"})
    whole = made.need("ddp", made.cfg).load_parts["base weights"]
    assert made.need(column, made.cfg).load_parts["base weights"] == whole > 38 * GIB
    sizes = made.model(made.cfg).sizes
    states = sum(sizes.linear) // 64 + sum(sizes.linear) // 64 // 256 * 4  # which are not cut
    shards = (whole - states + 4 * (sum(sizes.policy) + sum(sizes.reference))) // NODE.gpus
    assert made.need("fsdp2", made.cfg).load_parts["transient"] == shards > 4.8 * GIB
    assert made.copy_bytes() is None
    in_parts = planner(tmp_path, NODE, QWEN72B)
    assert in_parts.need(column, in_parts.cfg).load_parts["base weights"] < whole / 6
    assert in_parts.need("ddp", in_parts.cfg).load_parts["base weights"] == whole


def test_loading_in_parts_is_the_first_thing_proposed(tmp_path):
    """An entry of its own beside what the section says already, written so that it is planned as proposed."""
    section = {"loading": "host", "compute": {"logits_chunk": 64}}
    made = planner(tmp_path, Machine(8, 47 * GIB // 2, 640 * GIB), QWEN72B, dpo_plugin=section)
    for column in ("zero3", "zero3_offload", "fsdp2"):
        assert made.need(column, made.cfg).limit(made.machine) == "load"
        found = made.verdict(column)
        assert found["change"] == {"dpo_plugin": {**section, "loading": "sharded"}}
        written = yaml.safe_load("\n".join(found["recipe"]))
        assert written["dpo_plugin"] == found["change"]["dpo_plugin"]
    assert made.change("ddp") is None
    again = planner(tmp_path, made.machine, QWEN72B, **written)
    assert again.used == "fsdp2"
    assert again.need("fsdp2", again.cfg).limit(made.machine) is None


def test_a_run_that_cannot_load_in_parts_says_why(tmp_path):
    zero = {"deepspeed": zero_file(tmp_path)}
    plan = plan_of(config_file(tmp_path, **zero, trust_remote_code=True), 2, 80, 64)
    assert plan["copy_on_disk_gib"] is None
    assert any("`trust_remote_code: true`" in note for note in plan["notes"])
    with pytest.raises(ConfigError, match="loading: sharded.*trust_remote_code.*Write: loading: host"):
        plan_of(config_file(tmp_path, **zero, trust_remote_code=True, dpo_plugin={"loading": "sharded"}), 2, 80, 64)


FSDP = {"fsdp_version": 2, "fsdp_config": {"offload_params": False, "reshard_after_forward": True}}


def test_fsdp2_moves_shards_to_the_host_before_anything_is_shortened(tmp_path):
    """One GPU: states, embeddings, head and the layers in work stay there, all else goes to a host that can hold it."""
    made = planner(tmp_path, Machine(1, 24 * GIB, 100 * GIB), QWEN72B, sequence_len=1024, **FSDP)
    assert made.need("fsdp2", made.cfg).limit(made.machine) == "load"
    change = made.change("fsdp2")
    assert change == {"fsdp_config": {"offload_params": True, "reshard_after_forward": True}}
    moved, states = made.need("fsdp2", {**made.cfg, **change}), 1_097_072_640 + 17_141_760
    assert moved.parts["base weights"] == moved.load_parts["base weights"] == states
    assert moved.parts["adapters"] == moved.parts["optimizer"] == moved.parts["gradients"] == 0
    assert moved.parts["communication"] > 2 * 2 * 152064 * 8192
    assert moved.host > 40 * GIB
    assert yaml.safe_load("\n".join(made.verdict("fsdp2")["recipe"])) == change
    made.machine = replace(made.machine, host=20 * GIB)
    assert made.change("fsdp2") is None
    other = planner(tmp_path, Machine(1, 24 * GIB, 100 * GIB), QWEN72B, sequence_len=1024).verdict("fsdp2")
    lines = yaml.safe_load("\n".join(other["recipe"]))
    assert lines["fsdp_config"]["offload_params"] is True


@pytest.mark.parametrize(
    ("column", "name"), [("ddp", "adamw_8bit"), ("zero3", "adamw_8bit"), ("fsdp2", "adamw_torch_8bit")]
)
def test_states_of_8_bits_are_proposed_under_the_name_that_the_engine_takes(tmp_path, column, name):
    """A tenth of the states is too much; the host has no room for what FSDP2 would move there."""
    made = planner(tmp_path, NODE, QWEN72B, sequence_len=1024)
    need = made.need(column, made.cfg)
    made.machine = replace(made.machine, gpu=need.step - need.parts["optimizer"] // 10, host=need.host)
    assert made.change(column) == {"optimizer": name}
    made.cfg = {**made.cfg, "optimizer": "lion_8bit"}
    assert "optimizer" not in (made.change(column) or {})


def test_a_change_that_a_later_one_makes_useless_is_not_proposed(tmp_path):
    """States of 8 bits are tried first, but the sequence is what has to be halved."""
    made = planner(tmp_path, Machine(4, 47 * GIB // 2, 64 * GIB), QWEN72B, sequence_len=2048)
    assert made.need("zero3", made.cfg).limit(made.machine) == "step"
    narrow = made.need("zero3", {**made.cfg, "optimizer": "adamw_8bit"})
    assert narrow.limit(made.machine) == "step"
    assert made.change("zero3") == {"sequence_len": 1024}
