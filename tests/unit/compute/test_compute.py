"""The flat layout, the scoring head and packing against two padded rows and the whole batch's logits."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_plugin.compute import attention
from dpo_plugin.compute import lm_head as heads
from dpo_plugin.compute.batching import PairCollator, shared_segments, to_pair_batch
from dpo_plugin.compute.gradient_checkpointing import layers_to_checkpoint, saved_bytes_per_token, without_checkpointing
from dpo_plugin.compute.lm_head import ForwardOptions
from dpo_plugin.compute.logps import completion_logps, run_model
from dpo_plugin.errors import DataError
from dpo_plugin.host.callbacks import checkpoint_layers
from dpo_plugin.model.adapters import attach
from tests.support import tiny

PAIRS = [tiny.example(9, 6, 8, 3), tiny.example(4, 12, 5, seed=1), tiny.example(15, 2, 2, 1, seed=2)]
SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def make_model(kind: str, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "sliding_window": None, **settings}
    if kind.endswith("_moe"):
        sizes |= {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        }
    config = AutoConfig.for_model(kind, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def with_lora(model, **settings):
    targets = {"target_modules": tiny.PROJECTIONS, "task_type": "CAUSAL_LM", "r": 4, **settings}
    policy = attach(model, LoraConfig(**targets), None)
    policy.train_only_policy()
    torch.manual_seed(1)
    for _, parameter in policy.policy_parameters():
        parameter.data = (torch.randn(parameter.shape) * 0.05).to(next(model.parameters()).dtype)
    return policy


def batch_of(pairs=PAIRS, **settings):
    return to_pair_batch(PairCollator(0, **settings)(pairs))


def plain(model, batch, options=None):
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return completion_logps(output.logits, batch, options)


FLAT = ("llama", "mistral", "qwen2", "qwen3")


def gradients(model, sums):
    model.zero_grad()
    weights = torch.linspace(0.5, 1.5, len(sums), dtype=sums.dtype)
    torch.tanh(sums / 50 * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(model, flat, rows, atol, rtol):
    expected = plain(model, rows)
    wanted = gradients(model, expected.sums)
    found = run_model(model, flat)
    got = gradients(model, found.sums)
    assert (found.sums - expected.sums).abs().max() <= atol
    assert (found.mean_logits - expected.mean_logits).abs().max() <= max(atol, 1e-7)
    assert torch.equal(found.tokens, expected.tokens)
    assert wanted.norm() > 1e-3
    assert (got - wanted).norm() / wanted.norm() <= rtol


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("adapter", [True, False])
def test_flat_pairs_equal_two_rows_in_fp64(kind, adapter):
    model = make_model(kind)
    attention.attend_to_pairs(model)
    model = with_lora(model) if adapter else model
    assert_same(model, batch_of(flat=True), batch_of(), 1e-9, 1e-6)


@pytest.mark.parametrize("kind", FLAT)
def test_flat_pairs_equal_two_rows_in_fp32(kind):
    model = make_model(kind, torch.float32)
    attention.attend_to_pairs(model)
    assert_same(with_lora(model), batch_of(flat=True), batch_of(), 1e-4, 1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_keeps_the_segments(reentrant):
    model = make_model("qwen2")
    attention.attend_to_pairs(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(with_lora(model), batch_of(flat=True), batch_of(), 1e-9, 1e-6)


def test_padding_to_a_multiple_changes_nothing():
    model = make_model("qwen2")
    attention.attend_to_pairs(model)
    flat = batch_of(flat=True, pad_to_multiple_of=64)
    assert flat.input_ids.shape == (1, 64)
    assert_same(with_lora(model), flat, batch_of(pad_to_multiple_of=16), 1e-9, 1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("head", ["frozen", "lora", "trained", "tied"])
def test_the_scoring_head_has_exact_gradients(head, chunk, monkeypatch):
    model = make_model("qwen2", tie_word_embeddings=head == "tied")
    if head == "lora":
        model = with_lora(model, target_modules=["q_proj", "lm_head"])
    elif head == "frozen":
        model = with_lora(model)
    rows = batch_of()
    expected = plain(model, rows)
    wanted = gradients(model, expected.sums)
    options = ForwardOptions(wpo=True, entropy=True, chunk=chunk)
    seen = []
    monkeypatch.setattr(heads, "_scores_and_gradient", spy(heads._scores_and_gradient, seen))
    found = run_model(model, rows, options)
    got = gradients(model, found.sums)
    assert (found.sums - expected.sums).abs().max() <= 1e-9
    assert (got - wanted).norm() / wanted.norm() <= 1e-6
    whole = plain(model, rows, ForwardOptions(wpo=True, entropy=True))
    torch.testing.assert_close(found.wpo_weights, whole.wpo_weights)
    torch.testing.assert_close(found.entropy, whole.entropy)
    assert 0 < found.entropy.min() <= found.entropy.max() <= math.log(256)
    assert max(seen, default=0) <= chunk
    assert bool(seen) == (head == "frozen")


def spy(function, seen):
    def spied(logits, *arguments):
        seen.append(len(logits))
        return function(logits, *arguments)

    return spied


def test_entropy_by_hand():
    """Logits (0, 0, ln 2) are probabilities 1/4, 1/4, 1/2: 2 · ¼ ln 4 + ½ ln 2 = 1.5 ln 2."""
    logits = torch.tensor([[0.0, 0.0, math.log(2)]], dtype=torch.float64)
    scores = heads.token_scores(logits, torch.tensor([2]), ForwardOptions(entropy=True))
    assert scores[0, heads.ENTROPY].item() == pytest.approx(1.5 * math.log(2), abs=1e-12)
    assert scores[0, heads.LOGP].item() == pytest.approx(-math.log(2), abs=1e-12)


def test_a_frozen_head_gets_no_gradient_and_keeps_its_forward():
    model = make_model("qwen2")
    forward = model.lm_head.forward
    policy = with_lora(model)
    gradients(policy, run_model(policy, batch_of()).sums)
    assert model.lm_head.weight.grad is None
    assert model.lm_head.forward == forward
    assert "forward" not in vars(model.lm_head)


def test_rows_behind_the_head_are_those_of_completions_alone():
    """A model whose logits nothing makes that the head or the root's forward has to offer."""
    model = make_model("llama")
    run = model.forward
    model.forward = lambda **inputs: SimpleNamespace(logits=run(**inputs).logits + 1e-3)
    shapes = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: shapes.append(logits.shape))
    run_model(model, batch_of([tiny.example(20, 3, 3)]))
    assert shapes == [(1, 1, 256), (2, 3, 256)]  # of one row, to find out; then of each that predicts a token


@pytest.mark.parametrize(
    ("row", "segments"),
    [
        (tiny.example(4, 3, 5, 2), (6, 1, 3)),
        ({"prompt_ids": [7], "chosen_ids": [5, 6], "rejected_ids": [5, 6]}, (2, 1, 1)),
        ({"prompt_ids": [7], "chosen_ids": [5], "rejected_ids": [5, 6, 8]}, (1, 1, 3)),
        ({"prompt_ids": [7, 8], "chosen_ids": [5], "rejected_ids": [6]}, (2, 1, 1)),
    ],
)
def test_the_prefix_is_the_longest_that_leaves_each_side_a_token(row, segments):
    assert shared_segments(row) == segments
    model = make_model("llama")
    attention.attend_to_pairs(model)
    assert_same(model, batch_of([row], flat=True), batch_of([row]), 1e-9, 1e-6)


def test_generation_with_padding_is_that_of_sdpa():
    """Left-padded prompts and a cache go through the same registered attention without segments."""
    model = make_model("qwen2", torch.float32).eval()
    ids = torch.tensor([[0, 0, 9, 8, 7], [3, 4, 5, 6, 7]])
    settings = {"attention_mask": (ids > 0).long(), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    attention.attend_to_pairs(model)
    assert torch.equal(model.generate(ids, **settings), expected)


@pytest.mark.parametrize("flat", [True, False])
def test_packs_hold_every_pair_once_within_the_budget(flat):
    pairs = [tiny.example(5 + n, 3 + n % 7, 2 + n % 5, seed=n) for n in range(20)]
    collator = PairCollator(0, flat=flat, max_tokens=120)
    packs = [to_pair_batch(pack) for pack in collator(pairs)["packs"]]
    assert sorted(key for pack in packs for key in pack.row_hashes) == sorted(batch_of(pairs).row_hashes)
    assert max(pack.input_ids.numel() for pack in packs) <= 120
    least = sum(collator.tokens([pair]) for pair in pairs) / 120
    assert len(packs) <= (1.3 * least + 1 if flat else 20)


def test_a_pair_above_the_budget_is_named():
    long = tiny.example(30, 10, 10, source="books")
    with pytest.raises(DataError, match=r"source 'books' takes 50 tokens.*max_tokens: 40.*Write: max_tokens: 50"):
        PairCollator(0, flat=True, max_tokens=40)([long])


def test_a_forward_without_gradients_is_not_checkpointed(recwarn):
    policy = with_lora(make_model("qwen2", num_hidden_layers=3))
    policy.gradient_checkpointing_enable({"use_reentrant": True})
    layers = [layer for layer in policy.modules() if isinstance(layer, GradientCheckpointingLayer)]
    layers[2].gradient_checkpointing = False  # as `checkpoint_layers: 2` leaves it
    with torch.no_grad():
        expected = run_model(policy, batch_of())
        assert [one for one in recwarn if "None of the inputs" in str(one.message)]
        recwarn.clear()
        with without_checkpointing(layers):
            found = run_model(policy, batch_of())
    assert not [one for one in recwarn if "None of the inputs" in str(one.message)]
    assert torch.equal(found.sums, expected.sums)
    assert [layer.gradient_checkpointing for layer in layers] == [True, True, False]


def test_fewer_layers_are_checkpointed_the_more_memory_there_is():
    """80 layers, 1000 tokens, 1 MB each: 1 GB a layer; of 100 GB, 15 % stay free and one layer is recomputed: 84 fit."""
    counts = [layers_to_checkpoint(80, 1000, 1e6, int(free)) for free in (0, 1e9, 21e9, 50e9, 100e9)]
    assert counts == [80, 80, 64, 39, 0]


def test_saved_bytes_are_those_of_a_layer_that_runs():
    """Linear in hidden size, independent of length, and back to checkpointing afterwards."""
    found = {}
    for size in (32, 64):
        model = with_lora(make_model("qwen2", torch.float32, hidden_size=size, intermediate_size=2 * size))
        layer = model.base_model.model.model.layers[0]
        layer.gradient_checkpointing = True
        found[size] = [saved_bytes_per_token(layer, model.config, "cpu", tokens) for tokens in (64, 256)]
        assert layer.gradient_checkpointing
    assert found[32][0] == pytest.approx(found[32][1], rel=0.1)
    assert found[64][1] == pytest.approx(2 * found[32][1], rel=0.15)
    assert found[32][1] > 4 * 32 * 10  # at least ten tensors of the hidden size in fp32


@pytest.mark.parametrize(
    ("kind", "settings", "known"),
    [
        ("qwen2", {}, True),
        ("phi", {"partial_rotary_factor": 0.5}, False),
        ("stablelm", {"partial_rotary_factor": 0.25}, False),
        ("falcon", {}, False),
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 8}, False),
    ],
)
def test_a_layer_that_is_called_otherwise_is_not_measured(kind, settings, known):
    """Rotary embeddings of a part of the head, and other signatures: RuntimeError, TypeError before."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**SIZES, "num_key_value_heads": 4, **settings})
    )
    layer = next(module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    layer.gradient_checkpointing = True
    found = saved_bytes_per_token(layer, model.config, "cpu", 16)
    assert (found is not None) == known
    assert layer.gradient_checkpointing


def test_all_layers_are_checkpointed_where_none_can_be_measured(monkeypatch, caplog):
    """On a GPU with free memory, `checkpoint_layers: auto` on phi-2 leaves the host's setting and says so."""
    model = make_model("phi", torch.float32, partial_rotary_factor=0.5)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.gradient_checkpointing = True
    accelerator = SimpleNamespace(device=torch.device("cuda"))
    args = SimpleNamespace(per_device_train_batch_size=1)
    trainer = SimpleNamespace(
        model=model, accelerator=accelerator, args=args, train_dataset=PAIRS, data_collator=PairCollator(0)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**36, 2**36))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    monkeypatch.setattr(
        checkpoint_layers, "saved_bytes_per_token", lambda layer, config, _: saved_bytes_per_token(layer, config, "cpu")
    )
    with caplog.at_level(logging.INFO):
        checkpoint_layers.CheckpointLayers(trainer, "auto").on_train_begin(None, None, None)
    assert all(layer.gradient_checkpointing for layer in layers)
    assert "all layers are checkpointed" in caplog.text
    assert "PhiDecoderLayer" in caplog.text


def test_a_flat_batch_needs_its_attention():
    """A flat batch on a model whose attention was not set would lose rejected's prompt without a word."""
    model = make_model("qwen2")
    flat = batch_of(flat=True)
    with pytest.raises(ValueError, match="attend_to_pairs"):
        run_model(model, flat)
