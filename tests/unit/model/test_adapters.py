"""Attaching, switching and saving two adapters, with PEFT as oracle."""

import json
import math
import time

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from dpo_plugin.compute.batching import PairCollator, to_pair_batch
from dpo_plugin.compute.logps import run_model
from dpo_plugin.errors import AdapterError, ConfigError
from dpo_plugin.model.adapter_config import AdapterFolder
from dpo_plugin.model.adapters import POLICY, REFERENCE, adapter_digest, adapter_tensors, attach
from dpo_plugin.model.finite import weights_not_finite
from tests.support import tiny

KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules_to_save": {"modules_to_save": ["norm"]},
    "tied embedding": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 6]},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 4}},
}
IDS = torch.arange(3, 27).reshape(2, 12)


def base_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def dual(base_dir, policy_dir, reference_dir=None):
    policy = AdapterFolder.open(policy_dir, "lora_model_dir")
    reference = AdapterFolder.open(reference_dir or policy_dir, "lora_model_dir")
    return attach(base_of(base_dir), policy, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_both_adapters_equal_the_file_tensor_by_tensor(base_dir, tmp_path, kind):
    folder = tiny.save_adapter(base_dir, tmp_path, **KINDS[kind])
    model = dual(base_dir, folder)
    expected = load_peft_weights(str(folder), device="cpu")
    for name in (POLICY, REFERENCE):
        found = adapter_tensors(model, name)
        assert {key for key in expected if "base_layer" not in key} <= found.keys()
        for key in found:
            assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_each_face_of_the_model_computes_what_peft_computes(base_dir, tmp_path, kind):
    policy_dir = tiny.save_adapter(base_dir, tmp_path / "policy", seed=1, **KINDS[kind])
    reference_dir = tiny.save_adapter(base_dir, tmp_path / "reference", seed=2, **KINDS[kind])
    model = dual(base_dir, policy_dir, reference_dir)
    as_policy = logits(model)
    with model.reference_active():
        as_reference = logits(model)
    with model.adapters_off():
        as_base = logits(model)
    torch.testing.assert_close(as_policy, logits(PeftModel.from_pretrained(base_of(base_dir), str(policy_dir))))
    torch.testing.assert_close(as_reference, logits(PeftModel.from_pretrained(base_of(base_dir), str(reference_dir))))
    torch.testing.assert_close(as_base, logits(base_of(base_dir)))
    assert not torch.allclose(as_policy, as_reference)
    torch.testing.assert_close(logits(model), as_policy)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_policy_adapter_is_trainable_and_in_fp32(base_dir, tmp_path, kind):
    folder = tiny.save_adapter(base_dir, tmp_path, **KINDS[kind])
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16)
    adapter = AdapterFolder.open(folder, "lora_model_dir")
    model = attach(base, adapter, adapter)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.policy_parameters()}
    assert trainable
    assert not [name for name in trainable if ".reference." in name or "base_layer" in name]
    assert {p.dtype for _, p in model.policy_parameters()} == {torch.float32}
    expected = load_peft_weights(str(folder), device="cpu")
    for name in (POLICY, REFERENCE):
        assert all(torch.equal(value, expected[key]) for key, value in adapter_tensors(model, name).items())
    assert logits(model).dtype == torch.bfloat16


def test_a_gradient_reaches_the_policy_and_nothing_else(base_dir, sft_dir):
    model = dual(base_dir, sft_dir)
    loss = model(IDS).logits.float().pow(2).mean()
    with model.reference_active(), torch.no_grad():
        model(IDS)
    loss.backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched == {name for name, _ in model.policy_parameters()}


def test_switching_touches_no_parameter_hook_or_module(base_dir, sft_dir, monkeypatch):
    model = dual(base_dir, sft_dir)
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    monkeypatch.setattr(torch.nn.Module, "named_modules", lambda *_, **__: pytest.fail("walked the module tree"))
    started = time.perf_counter()
    for _ in range(200):
        with model.reference_active():
            pass
    assert time.perf_counter() - started < 0.1  # seconds
    monkeypatch.undo()
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_and_reference_take_the_same_numeric_path(base_dir, sft_dir, dtype):
    adapter = AdapterFolder.open(sft_dir, "lora_model_dir")
    model = attach(AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype), adapter, adapter)
    batch = to_pair_batch(PairCollator(0)([tiny.example(6, 5, 7)]))
    policy = run_model(model, batch).sums
    with model.reference_active():
        assert torch.equal(run_model(model, batch).sums, policy)
    assert policy.dtype == torch.float32


def test_a_fresh_lora_and_its_base_take_the_same_numeric_path_in_bf16(base_dir):
    config = LoraConfig(r=4, target_modules=tiny.PROJECTIONS, task_type="CAUSAL_LM")
    model = attach(AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16), config, None)
    as_policy = logits(model)
    with model.adapters_off():
        assert torch.equal(logits(model), as_policy)


def test_another_librarys_set_adapter_is_noticed(base_dir, sft_dir):
    model = dual(base_dir, sft_dir)
    model.set_adapter(POLICY)
    with pytest.raises(AdapterError, match="set_adapter"), model.reference_active():
        pass


def test_save_writes_the_policy_alone_and_peft_matches_every_key(base_dir, sft_dir, tmp_path):
    model = dual(base_dir, sft_dir)
    model.save_pretrained(str(tmp_path))
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    saved, original = (
        load_file(tmp_path / "adapter_model.safetensors"),
        load_file(sft_dir / "adapter_model.safetensors"),
    )
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in saved)
    loaded = PeftModel.from_pretrained(base_of(base_dir), str(tmp_path))
    result = loaded.load_adapter(str(tmp_path), "again")
    assert not result.unexpected_keys
    assert not result.missing_keys


def test_a_fresh_lora_starts_as_the_base(base_dir):
    config = LoraConfig(r=4, target_modules=tiny.PROJECTIONS, task_type="CAUSAL_LM")
    model = attach(base_of(base_dir), config, None)
    assert model.starts_as_base
    assert not model.has_reference
    torch.testing.assert_close(logits(model), logits(base_of(base_dir)))


def test_the_digest_sees_one_changed_bit(base_dir, sft_dir):
    model = dual(base_dir, sft_dir)
    assert model.digests[POLICY] == model.digests[REFERENCE] == adapter_digest(model, REFERENCE)
    parameter = next(p for name, p in model.named_parameters() if ".reference." in name)
    with torch.no_grad():
        first = parameter.view(-1)[:1]
        first.copy_(torch.nextafter(first, torch.tensor([9.0])))
    assert adapter_digest(model, REFERENCE) != model.digests[REFERENCE]


class TestInits:
    """PiSSA, OLoRA, CorDA and LoRA-GA subtract the adapter's start from the base, LoftQ rounds it; others do not."""

    def trained(self, base_dir, folder, init):
        """Logits of a model whose adapter was trained from such a start, and the adapter in a folder."""
        torch.manual_seed(1)
        config = LoraConfig(r=8, target_modules=tiny.PROJECTIONS, task_type="CAUSAL_LM", init_lora_weights=init)
        model = get_peft_model(base_of(base_dir), config)
        model.save_pretrained(str(folder / "start"))
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(torch.randn_like(parameter) * 0.02)
        expected = logits(model)
        model.save_pretrained(str(folder / "raw"))
        return model, expected

    @pytest.mark.parametrize("init", [False, "gaussian", "eva", "orthogonal", "mica"])
    def test_an_init_that_leaves_the_base_alone(self, base_dir, tmp_path, init):
        _, expected = self.trained(base_dir, tmp_path, init)
        model = dual(base_dir, tmp_path / "raw")
        torch.testing.assert_close(logits(model), expected)
        torch.testing.assert_close(
            logits(PeftModel.from_pretrained(base_of(base_dir), str(tmp_path / "raw"))), expected
        )
        with model.adapters_off():
            torch.testing.assert_close(logits(model), logits(base_of(base_dir)))

    @pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
    def test_one_that_changes_the_base_is_taken_as_peft_converts_it(self, base_dir, tmp_path, init):
        """Attached raw, twice, its log-probs were 0.45 nats off on 14 tokens, and without adapters the base's were."""
        model, expected = self.trained(base_dir, tmp_path, init)
        with pytest.raises(
            AdapterError, match=rf"`lora_model_dir: .*{init}.*path_initial_model_for_weight_conversion"
        ) as e:
            dual(base_dir, tmp_path / "raw")
        assert len(str(e.value).replace(str(tmp_path), "")) < 500
        model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        ours = dual(base_dir, tmp_path / "plain")
        torch.testing.assert_close(logits(ours), expected, atol=1e-4, rtol=1e-4)
        with ours.adapters_off():
            torch.testing.assert_close(logits(ours), logits(base_of(base_dir)))

    @pytest.mark.parametrize(
        ("init", "way_out"),
        [("corda", "for_weight_conversion"), ("lora_ga", "for_weight_conversion"), ("loftq", "merge_and_unload")],
    )
    def test_one_that_cannot_be_made_here(self, sft_dir, tmp_path, init, way_out):
        loftq = {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}} if init == "loftq" else {}
        folder = copy_adapter(sft_dir, tmp_path, init_lora_weights=init, **loftq)
        with pytest.raises(AdapterError, match=rf"init_lora_weights: {init}.*{way_out}.*Write: "):
            AdapterFolder.open(folder, "lora_model_dir")

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_a_fresh_one_would_not_have_the_base_as_reference(self, base_dir, init):
        """Its reference was W − BA: 1.75 nats off."""
        config = LoraConfig(r=8, target_modules=tiny.PROJECTIONS, task_type="CAUSAL_LM", init_lora_weights=init)
        with pytest.raises(
            ConfigError, match=f"`peft_init_lora_weights` .* {init}, .*Write: peft_init_lora_weights: null"
        ):
            attach(base_of(base_dir), config, None)

    @pytest.mark.parametrize("init", [True, "gaussian", "eva"])
    def test_a_fresh_one_that_adds_nothing_is_checked_at_step_0(self, base_dir, init):
        config = LoraConfig(r=8, target_modules=tiny.PROJECTIONS, task_type="CAUSAL_LM", init_lora_weights=init)
        model = attach(base_of(base_dir), config, None)
        assert model.starts_as_base
        assert torch.equal(logits(model), logits(base_of(base_dir)))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"lora_alpha": 36}, False),
        ({"use_rslora": True}, False),
        ({"alpha_pattern": {"q_proj": 4}}, False),
        ({"lora_dropout": 0.5, "base_model_name_or_path": "elsewhere"}, True),
        ({"use_qalora": None, "qalora_group_size": None}, True),  # as an older PEFT writes it
    ],
)
def test_the_digest_sees_what_scales_the_adapter(base_dir, sft_dir, tmp_path, change, same):
    folder = copy_adapter(sft_dir, tmp_path, **change)
    assert (dual(base_dir, folder).digests[REFERENCE] == dual(base_dir, sft_dir).digests[REFERENCE]) == same


class TestNotFinite:
    @pytest.mark.parametrize(
        ("part", "owner", "write"),
        [
            (".layers.1.mlp.up_proj.base_layer.weight", "base model", "base_model: <a model"),
            (f".layers.1.mlp.up_proj.lora_B.{POLICY}.weight", "policy adapter", "learning_rate: <a smaller"),
            (f".layers.1.mlp.up_proj.lora_B.{REFERENCE}.weight", "reference adapter", "lora_model_dir: <an adapter"),
        ],
    )
    def test_the_owner_of_the_weights_is_named(self, base_dir, sft_dir, part, owner, write):
        model = dual(base_dir, sft_dir)
        assert weights_not_finite(model) is None
        name, weight = next((name, p) for name, p in model.named_parameters() if name.endswith(part))
        weight.data[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
        found = weights_not_finite(model)
        assert found.startswith(f"3 of {weight.numel()} values of the {owner}'s {name} are not finite")
        assert f"it is the {owner} and not the row. Write: {write}" in found

    def test_a_full_fine_tune_and_its_second_model(self, base_dir):
        trained, reference = base_of(base_dir), base_of(base_dir)
        assert weights_not_finite(trained, reference) is None
        reference.model.norm.weight.data[7] = math.nan
        assert "1 of 192 values of the reference model's model.norm.weight" in weights_not_finite(trained, reference)
        trained.model.norm.weight.data[7] = math.nan
        assert "the trained model's model.norm.weight" in weights_not_finite(trained, reference)

    def test_scales_of_4_bit_weights(self, base_dir):
        quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        model = AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=quantised)
        assert weights_not_finite(model) is None
        model.model.layers[0].mlp.up_proj.weight.quant_state.offset.fill_(math.nan)
        assert "layers.0.mlp.up_proj.weight are not finite" in weights_not_finite(model)


class TestMisfits:
    def test_another_hidden_size_names_the_first_module(self, base_dir, sft_dir):
        config = Qwen2Config(**{**base_of(base_dir).config.to_dict(), "hidden_size": 96, "num_attention_heads": 6})
        adapter = AdapterFolder.open(sft_dir, "lora_model_dir")
        with pytest.raises(AdapterError, match=r"does not fit the base model.*layers\.0.*shape"):
            attach(Qwen2ForCausalLM(config), adapter, adapter)

    def test_a_vocabulary_with_added_tokens(self, base_dir, tmp_path):
        wider = base_of(base_dir)
        wider.resize_token_embeddings(wider.config.vocab_size + 8)
        wider.save_pretrained(tmp_path / "wider")
        folder = tiny.save_adapter(tmp_path / "wider", tmp_path / "adapter", modules_to_save=["embed_tokens"])
        with pytest.raises(
            AdapterError, match=r"does not fit the base model.*embed_tokens.*Write: base_model: .*wider"
        ):
            dual(base_dir, folder)

    def test_no_target_module_in_the_base(self, base_dir, sft_dir, tmp_path):
        folder = copy_adapter(sft_dir, tmp_path, target_modules=["c_attn"])
        with pytest.raises(AdapterError, match="c_attn"):
            dual(base_dir, folder)

    def test_a_target_module_less(self, base_dir, sft_dir, tmp_path):
        folder = copy_adapter(sft_dir, tmp_path, target_modules=["q_proj"])
        with pytest.raises(AdapterError, match=r"no place for \d+ of its tensors, the first is .*_proj"):
            dual(base_dir, folder)

    def test_weights_missing_from_the_file(self, base_dir, sft_dir, tmp_path):
        folder = copy_adapter(sft_dir, tmp_path)
        tensors = load_file(folder / "adapter_model.safetensors")
        del tensors[sorted(tensors)[0]]
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match="finds no weights for 1 of its tensors"):
            dual(base_dir, folder)

    @pytest.mark.parametrize(("change", "reason"), [({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "bias")])
    def test_what_cannot_be_held_twice(self, sft_dir, tmp_path, change, reason):
        with pytest.raises(AdapterError, match=reason):
            AdapterFolder.open(copy_adapter(sft_dir, tmp_path, **change), "lora_model_dir")

    def test_settings_that_peft_reads_without_end(self, sft_dir, tmp_path):
        """PEFT 0.20 takes the keys of a settings object that it does not know for its own, and begins anew."""
        folder = copy_adapter(sft_dir, tmp_path, monteclora_config={"q_proj": 4})
        with pytest.raises(AdapterError, match=r"cannot be used.* Save the adapter again"):
            AdapterFolder.open(folder, "lora_model_dir")


def copy_adapter(folder, target, **changes):
    import shutil

    shutil.copytree(folder, target, dirs_exist_ok=True)
    file = target / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return target
