"""Two adapters on the parameters of experts, with PEFT and one adapter as oracle."""

import json
from contextlib import nullcontext

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dpo_plugin.compute.batching import PairCollator, to_pair_batch
from dpo_plugin.compute.logps import run_model
from dpo_plugin.errors import AdapterError, ConfigError
from dpo_plugin.model.adapter_config import (
    AdapterFolder,
    adapter_facts,
    adapter_settings,
    check_equal_parameters,
)
from dpo_plugin.model.adapters import POLICY, REFERENCE, adapter_digest, adapter_tensors, attach
from dpo_plugin.model.target_parameters import check_expert_count, check_fresh_parameters
from tests.support import tiny
from tests.support.tiny import EXPERTS

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "experts and modules": {**ATTENTION, "target_parameters": EXPERTS},
    "one parameter": {"target_modules": [], "target_parameters": EXPERTS[:1]},
    "router": {**ATTENTION, "target_parameters": ["mlp.gate.weight"]},
    "one layer": {"target_modules": [], "target_parameters": [f"layers.1.{name}" for name in EXPERTS]},
    "rslora": {
        **ATTENTION,
        "target_parameters": EXPERTS,
        "use_rslora": True,
        "rank_pattern": {r".*\.gate_up_proj": 4},
        "alpha_pattern": {r".*\.down_proj": 3},
    },
    "modules_to_save": {**ATTENTION, "target_parameters": EXPERTS, "modules_to_save": ["norm"]},
    "exclude_modules": {**ATTENTION, "target_parameters": EXPERTS, "exclude_modules": r".*layers\.1.*"},
    "modules that become parameters": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: tiny.save_moe(kind, tmp_path_factory.mktemp(kind)) for kind in tiny.MOE}


def base_of(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def alone(base_dir, folder):
    """The oracle: one adapter, as PEFT loads it."""
    return PeftModel.from_pretrained(base_of(base_dir), str(folder), is_trainable=True)


def dual(base_dir, policy_dir, reference_dir, **settings):
    policy, reference = (AdapterFolder.open(folder, "lora_model_dir") for folder in (policy_dir, reference_dir))
    return attach(base_of(base_dir, **settings), policy, reference)


def sums(model):
    """Log-probs (2 * pairs,) of two pairs, in nats."""
    return run_model(model, to_pair_batch(PairCollator(0)([tiny.example(6, 5, 7), tiny.example(9, 8, 4, seed=1)]))).sums


@pytest.fixture
def pair(bases, tmp_path):
    """Saves policy and reference of a kind on the Qwen3 mixture."""

    def save(kind, base="qwen3_moe", other=None):
        settings = (KINDS[kind], KINDS[other or kind])
        return [
            bases[base],
            *(tiny.save_adapter(bases[base], tmp_path / str(n), n, **s) for n, s in enumerate(settings)),
        ]

    return save


MIXTRAL = [("experts and modules", "mixtral"), ("one parameter", "mixtral")]


@pytest.mark.parametrize(("kind", "base"), [*((kind, "qwen3_moe") for kind in KINDS), *MIXTRAL])
def test_each_face_of_the_model_computes_what_peft_computes(pair, kind, base):
    base_dir, policy_dir, reference_dir = pair(kind, base)
    model = dual(base_dir, policy_dir, reference_dir)
    with torch.no_grad():
        as_policy = sums(model)
        with model.reference_active():
            as_reference = sums(model)
        with model.adapters_off():
            as_base = sums(model)
        for found, expected in [
            (as_policy, sums(alone(base_dir, policy_dir))),
            (as_reference, sums(alone(base_dir, reference_dir))),
            (as_base, sums(base_of(base_dir))),
            (sums(model), as_policy),
        ]:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    assert (as_policy - as_reference).abs().min() > 1e-3
    assert (as_policy - as_base).abs().min() > 1e-3
    for name, folder in ((POLICY, policy_dir), (REFERENCE, reference_dir)):
        found, file = adapter_tensors(model, name), load_peft_weights(str(folder), device="cpu")
        assert found.keys() == file.keys()
        assert all(torch.equal(found[key], file[key]) for key in file)


@pytest.mark.parametrize("other", ["modules", "one parameter"])
def test_one_adapter_on_parameters_and_one_on_modules(bases, tmp_path, other):
    experts = tiny.save_adapter(bases["qwen3_moe"], tmp_path / "experts", **KINDS["experts"])
    modules = tiny.save_adapter(bases["qwen3_moe"], tmp_path / "modules", 2, **ATTENTION)
    for policy_dir, reference_dir in ((experts, modules), (modules, experts)):
        model = dual(bases["qwen3_moe"], policy_dir, reference_dir)
        with torch.no_grad():
            torch.testing.assert_close(sums(model), sums(alone(bases["qwen3_moe"], policy_dir)))
            with model.reference_active():
                torch.testing.assert_close(sums(model), sums(alone(bases["qwen3_moe"], reference_dir)))


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("kind", ["experts", "experts and modules", "router"])
def test_a_step_is_that_of_the_policy_alone(pair, tmp_path, kind, checkpointing):
    """Between forward and backward, which computes checkpointed layers again, the model has been the reference."""
    base_dir, policy_dir, reference_dir = pair(kind)
    model, oracle = dual(base_dir, policy_dir, reference_dir), alone(base_dir, policy_dir)
    if checkpointing:
        for one in (model, oracle):
            one.enable_input_require_grads()
            one.gradient_checkpointing_enable(checkpointing)
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5])
    model.train()
    loss = sums(model) @ weights
    with model.reference_active(), torch.no_grad():
        before = sums(model)
    loss.backward()
    (sums(oracle.train()) @ weights).backward()
    expected = {name: parameter.grad for name, parameter in oracle.named_parameters() if parameter.requires_grad}
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())
    digest = adapter_digest(model, REFERENCE)
    torch.optim.SGD([p for _, p in model.policy_parameters()], lr=1e-4).step()
    assert adapter_digest(model, REFERENCE) == digest == model.digests[REFERENCE]
    assert adapter_digest(model, POLICY) != model.digests[POLICY]
    with torch.no_grad(), model.reference_active():
        assert torch.equal(sums(model), before)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = alone(base_dir, tmp_path / "saved")
    result = loaded.load_adapter(str(tmp_path / "saved"), "again")
    assert not result.missing_keys
    assert not result.unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(sums(loaded), sums(model), rtol=0, atol=1e-5)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(sums(merged), sums(model), rtol=0, atol=1e-4)


def test_adapters_are_fp32_on_a_16_bit_base_and_take_one_path(pair):
    base_dir, policy_dir, _ = pair("modules_to_save")
    model = dual(base_dir, policy_dir, policy_dir, dtype=torch.bfloat16)
    assert {p.dtype for _, p in model.adapter_parameters()} == {torch.float32}
    with torch.no_grad():
        policy = sums(model)
        with model.reference_active():
            assert torch.equal(sums(model), policy)


@pytest.mark.parametrize("base", tiny.MOE)
def test_an_adapter_with_a_module_for_each_expert_is_taken_as_peft_converts_it(bases, tmp_path, base):
    """As PEFT saved them on transformers 4; with the dropout of SFT, which PEFT alone does not load on parameters."""
    qwen = base == "qwen3_moe"
    *first, last = ("gate_proj", "up_proj", "down_proj") if qwen else ("w1", "w3", "w2")
    experts, width = ("mlp.experts", 48) if qwen else ("block_sparse_moe.experts", 96)
    sizes = {"q_proj": (64, 64), **dict.fromkeys(first, (64, width)), last: (width, 64)}
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for name, (inside, out) in sizes.items():
            for place in ["self_attn"] if name == "q_proj" else [f"{experts}.{number}" for number in range(4)]:
                key = f"base_model.model.model.layers.{layer}.{place}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(4, inside, generator=draw) * 0.1
                tensors[f"{key}.lora_B.weight"] = torch.randn(out, 4, generator=draw) * 0.1
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(sizes), "task_type": "CAUSAL_LM"}
    for folder, dropout in (("plain", 0.0), ("dropout", 0.05)):
        LoraConfig(**settings, lora_dropout=dropout).save_pretrained(str(tmp_path / folder))
        save_file(tensors, tmp_path / folder / "adapter_model.safetensors")
    model = dual(bases[base], tmp_path / "dropout", tmp_path / "plain")
    assert model.digests[POLICY] == model.digests[REFERENCE]
    model.save_pretrained(str(tmp_path / "saved"))
    with torch.no_grad():
        expected = sums(alone(bases[base], tmp_path / "plain"))
        for found in (sums(model), sums(alone(bases[base], tmp_path / "saved"))):
            torch.testing.assert_close(found, expected)


def partition(base):
    """Leave of each parameter what ``zero.Init`` leaves in ``data``: nothing, and its shape beside it."""
    for parameter in base.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, parameter.data[:0].flatten()
    return base


def test_adapters_have_the_shapes_of_experts_that_are_partitioned(pair):
    """PEFT 0.20 alone takes them from what is left on a rank; once no host has it, `whole_shapes` can go."""
    base_dir, policy_dir, _ = pair("experts")
    needed = Version(peft.__version__) < Version("0.21")
    with pytest.raises(IndexError, match="tuple index out of range") if needed else nullcontext():
        PeftModel(partition(base_of(base_dir)), LoraConfig.from_pretrained(str(policy_dir)))
    folder = AdapterFolder.open(policy_dir, "lora_model_dir")
    model = attach(partition(base_of(base_dir)), folder, folder)
    file = load_peft_weights(str(policy_dir), device="cpu")
    for name in (POLICY, REFERENCE):
        found = adapter_tensors(model, name)
        assert found.keys() == file.keys()
        assert all(torch.equal(found[key], file[key]) for key in file)
    fresh = LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.nothing"])
    with pytest.raises(ConfigError, match=r"Write: lora_target_parameters: \[mlp.experts.down_proj, mlp.experts.gate"):
        attach(partition(base_of(base_dir)), fresh, None)


class TestSettings:
    def test_the_order_of_names_changes_nothing(self):
        """PEFT makes a set of the list, whose order differs between processes."""
        one, other = ({"r": 8, "target_parameters": names} for names in (EXPERTS, set(EXPERTS)))
        assert adapter_settings(one) == adapter_settings(other)
        assert adapter_settings(one) != adapter_settings({"r": 8, "target_parameters": EXPERTS[:1]})

    def test_the_owner_of_nested_wrappers_is_named(self):
        keys = [f"model.layers.0.mlp.experts{inner}.lora_A.weight" for inner in ("", ".base_layer")]
        assert adapter_facts({"r": 8}, keys)["lora_target_modules"] == ["experts"]

    @pytest.mark.parametrize(
        "change", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "orthogonal"}], ids=str
    )
    def test_what_peft_does_not_load_on_parameters(self, pair, change):
        _, folder, _ = pair("experts")
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        [(name, value)] = change.items()
        with pytest.raises(AdapterError, match=rf"`lora_model_dir: .*`{name}: {value}`.* Save the adapter again\.$"):
            AdapterFolder.open(folder, "lora_model_dir")

    @pytest.mark.parametrize(
        ("key", "value", "line"),
        [
            ("peft_use_dora", True, "peft_use_dora: false"),
            ("peft_init_lora_weights", "orthogonal", "peft_init_lora_weights: null"),
            (
                "peft_layers_to_transform",
                [1],
                "lora_target_parameters: [layers.1.mlp.experts.gate_up_proj, layers.1.mlp.experts.down_proj], without "
                "peft_layers_to_transform",
            ),
        ],
    )
    def test_what_a_fresh_lora_cannot_be(self, key, value, line):
        check_fresh_parameters({key: value})
        with pytest.raises(ConfigError) as error:
            check_fresh_parameters({key: value, "lora_target_parameters": EXPERTS})
        assert str(error.value).startswith(f"`{key}: ")
        assert str(error.value).endswith(f"Write: {line}")

    @pytest.mark.parametrize("missing", ["mlp.experts.nothing", "nothing", "attn.down_proj"])
    def test_a_fresh_lora_on_a_parameter_that_is_not_there(self, bases, missing):
        """PEFT would leave it out without a word."""
        config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=[*EXPERTS, missing])
        line = "lora_target_parameters: [mlp.experts.down_proj, mlp.experts.gate_up_proj]"
        with pytest.raises(ConfigError) as error:
            attach(base_of(bases["qwen3_moe"]), config, None)
        assert str(error.value).startswith(f"`lora_target_parameters` has {missing!r}")
        assert str(error.value).endswith(f"Write: {line}")

    def test_dora_on_modules_that_become_parameters_names_the_key(self, bases):
        config = LoraConfig(r=4, use_dora=True, **KINDS["modules that become parameters"])
        with pytest.raises(AdapterError, match="use_dora=True.*Write: peft_use_dora: false$"):
            attach(base_of(bases["qwen3_moe"]), config, None)

    def test_other_parameters_are_refused_with_both_sets(self, pair):
        _, mine, theirs = pair("experts", other="one parameter")
        policy, reference = AdapterFolder.open(mine, "lora_model_dir"), AdapterFolder.open(theirs, "adapter_dir")
        ours = "[mlp.experts.down_proj, mlp.experts.gate_up_proj]"
        with pytest.raises(ConfigError) as error:
            check_equal_parameters(policy, None, reference)
        for part in (str(mine), str(theirs), ours, "[mlp.experts.gate_up_proj]"):
            assert part in str(error.value)
        assert str(error.value).endswith(f"Write: adapter_dir: <an adapter on {ours}>")
        with pytest.raises(ConfigError, match=r"Write: lora_target_parameters: \[mlp.experts.gate_up_proj\]$"):
            check_equal_parameters(None, EXPERTS, reference)
        check_equal_parameters(policy, None, policy)
        check_equal_parameters(None, EXPERTS[::-1], policy)
        check_equal_parameters(None, None, reference)

    @pytest.mark.parametrize("kind", ["experts", "experts and modules", "one parameter", "rslora", "router"])
    @pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"])
    def test_as_many_experts_as_the_base_has(self, pair, kind, name):
        _, folder, _ = pair(kind)
        opened, base = AdapterFolder.open(folder, "lora_model_dir"), PreTrainedConfig(**{name: 4})
        check_expert_count(opened.config, "lora_model_dir", opened.path, base)
        check_expert_count(opened.config, "lora_model_dir", opened.path, PreTrainedConfig())

    @pytest.mark.parametrize("base", tiny.MOE)
    def test_another_number_of_experts_is_refused_with_both_shapes(self, bases, tmp_path, base):
        folder = tiny.save_adapter(bases[base], tmp_path / "four", **KINDS["experts and modules"])
        config = tiny.moe_config(base)
        config.num_experts = 8
        opened = AdapterFolder.open(folder, "dpo_plugin.reference.adapter_dir")
        with pytest.raises(AdapterError) as error:
            check_expert_count(opened.config, opened.key, opened.path, config)
        for part in (f"`{opened.key}: {folder}` is on 4 experts", "is (32, ", "make it (64, ", "`num_experts: 8`"):
            assert part in str(error.value)
        assert str(error.value).endswith(f"Write: base_model: {bases[base]}")

    def test_another_number_of_experts_with_a_lora_each(self, tmp_path):
        keys = [f"base_model.model.model.layers.0.mlp.experts.{number}.up_proj" for number in range(3)]
        save_file({f"{key}.lora_A.weight": torch.ones(4, 64) for key in keys}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=r"has a LoRA for each of 3 experts, and .* `num_experts: 4`.*base: x$"):
            check_expert_count(
                {"r": 4, "base_model_name_or_path": "base: x"}, "key", tmp_path, tiny.moe_config("qwen3_moe")
            )
