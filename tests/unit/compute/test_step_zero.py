"""Policy = reference before the first step: sums in a fixed order, and a tolerance that no wrong reference passes."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import disable_dropout_in_model

from dpo_plugin.compute.batching import PairCollator, to_pair_batch
from dpo_plugin.compute.dropout import disable_dropout
from dpo_plugin.compute.lm_head import ENTROPY, LOGP, ForwardOptions
from dpo_plugin.compute.logps import pair_logps, run_model, sum_completions
from dpo_plugin.compute.step_zero import largest_deviation, tolerance
from dpo_plugin.model.adapter_config import AdapterFolder
from dpo_plugin.model.adapters import REFERENCE, attach
from tests.support import tiny

aten = torch.ops.aten


class AnyOrder(TorchDispatchMode):
    """Adds as CUDA's atomics do, in whatever order (torch.use_deterministic_algorithms lists the operations)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten.index_add.default, aten.index_add_.default):
            into, dim, index, source = args
            order = torch.randperm(len(index))
            return func(into, dim, index[order], source.index_select(dim, order), **(kwargs or {}))
        listed = {aten.scatter_add.default, aten.scatter_add_.default, aten.cumsum.default}
        assert func not in listed or not args[0].is_floating_point(), func
        return func(*args, **(kwargs or {}))


def scored(tokens, seed=0, dtype=torch.float32):
    """A pair of `tokens` and `tokens` − 3 completion tokens, and made scores of its tokens."""
    draw = torch.Generator().manual_seed(seed)
    batch = to_pair_batch(PairCollator(0)([tiny.example(5, tokens, tokens - 3, seed=seed)]))
    scores = torch.randn(len(batch.labels), 4, generator=draw, dtype=torch.float64)
    scores[:, LOGP] = -scores[:, LOGP].exp()  # mean −1.6 nats, as of a language model
    return batch, scores.to(dtype)


@pytest.mark.parametrize("tokens", [2048, 4096, 8192])
def test_sums_do_not_depend_on_the_order_of_a_gpus_threads(tokens):
    """The same scores summed by policy and reference: in fp32, rewards came out up to 5.3e-3 apart at 8192 tokens."""
    batch, scores = scored(tokens)
    options = ForwardOptions(wpo=True, entropy=True)
    scores.requires_grad_()
    with AnyOrder():
        found = [sum_completions(scores, batch, options) for _ in range(8)]
        gradients = [torch.autograd.grad(one.sums.sum(), scores)[0] for one in found]
    exact = torch.stack([part.sum() for part in scores[:, LOGP].double().split([tokens, tokens - 3])])
    for one, gradient in zip(found, gradients, strict=True):
        assert torch.equal(one.sums, exact.float())
        for name in ("tokens", "mean_logits", "wpo_weights", "entropy"):
            assert torch.equal(getattr(one, name), getattr(found[0], name)), name
        assert torch.equal(gradient[:, LOGP], torch.ones(len(scores)))
        assert not gradient[:, ENTROPY].any()


def test_sums_of_several_pairs_and_of_an_empty_side():
    """Sides of 3, 0, 2 and 4 tokens; a prompt of no token leaves an answer of one without anything to predict."""
    rows = [
        {"prompt_ids": [4], "chosen_ids": [1, 2, 3], "rejected_ids": [7, 8]},
        {"prompt_ids": [], "chosen_ids": [5], "rejected_ids": [5, 6, 7, 8, 9]},
    ]
    batch = to_pair_batch(PairCollator(0)(rows))
    scores = torch.arange(1.0, 10.0)[:, None].expand(9, 4).clone().requires_grad_()
    found = sum_completions(scores, batch, ForwardOptions())
    assert found.tokens.tolist() == [3, 0, 2, 4]
    assert found.sums.tolist() == [6, 0, 9, 30]
    assert found.mean_logits.tolist() == [2, 0, 4.5, 7.5]
    (gradient,) = torch.autograd.grad((found.sums * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(), scores)
    assert gradient[:, LOGP].tolist() == [1, 1, 1, 3, 3, 4, 4, 4, 4]


# ── a wrong reference ──


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def models(request, base_dir, sft_dir, tmp_path_factory):
    """Policy and reference from one adapter, with dropout that is off in eval mode; and with another reference."""
    other_dir = tiny.save_adapter(base_dir, tmp_path_factory.mktemp("other"), seed=2)
    sft, other = (AdapterFolder.open(folder, "lora_model_dir") for folder in (sft_dir, other_dir))
    pair = [
        attach(AutoModelForCausalLM.from_pretrained(base_dir, dtype=request.param), sft, reference).eval()
        for reference in (sft, other)
    ]
    return request.param, *pair


@contextmanager
def changed(model, change):
    """One weight of the reference adapter, changed."""
    weight = dict(model.named_parameters())[f"base_model.model.model.layers.0.mlp.down_proj.lora_B.{REFERENCE}.weight"]
    before = weight.data.clone()
    weight.data[0, 0] = change(weight.data[0, 0])
    with model.reference_active():
        yield
    weight.data.copy_(before)


@contextmanager
def dropout(model):
    """Dropout on what the reference adapter reads."""
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: (nn.functional.dropout(inputs[0], 0.05),))
        for name, module in model.named_modules()
        if name.endswith(f"lora_A.{REFERENCE}")
    ]
    with model.reference_active():
        yield
    for hook in hooks:
        hook.remove()


@contextmanager
def eager(model):
    """The same adapter, through another attention kernel."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with model.reference_active():
        yield
    model.set_attn_implementation(before)


def deviation(dtype, model, reference, tokens, cut=0):
    """Policy and reference on a pair; `cut` leaves out that many tokens of the reference's prompt."""
    torch.manual_seed(0)
    row = tiny.example(16, tokens, tokens, seed=tokens)
    shorter = {**row, "prompt_ids": row["prompt_ids"][cut:]}
    batch, theirs = (to_pair_batch(PairCollator(0)([ids])) for ids in (row, shorter))
    with torch.no_grad():
        policy = run_model(model, batch)
        with reference:
            ref = run_model(model, theirs).sums
    return largest_deviation(pair_logps(policy, torch.stack(ref.chunk(2), dim=1), 0.1), dtype)


@pytest.mark.parametrize("tokens", [26, 512])
class TestReferences:
    def test_the_right_one_is_0_apart(self, models, tokens):
        dtype, model, _ = models
        assert deviation(dtype, model, model.reference_active(), tokens).nats == 0

    def test_another_kernel_is_explained(self, models, tokens):
        dtype, model, _ = models
        assert deviation(dtype, model, eager(model), tokens).explained

    @pytest.mark.parametrize("fault", ["no adapter", "another adapter", "dropout", "shifted template", "one weight"])
    def test_a_wrong_one_is_not(self, models, tokens, fault):
        dtype, model, with_other = models
        if fault == "shifted template":
            found = deviation(dtype, model, model.reference_active(), tokens, cut=1)
        else:
            model = with_other if fault == "another adapter" else model
            reference = {
                "no adapter": model.adapters_off,
                "another adapter": model.reference_active,
                "dropout": lambda: dropout(model),
                "one weight": lambda: changed(model, lambda weight: weight + 1),
            }[fault]()
            found = deviation(dtype, model, reference, tokens)
        assert not found.explained
        assert found.nats > 1.8e-2 * math.sqrt(tokens)

    def test_one_bf16_spacing_of_one_weight_is_noticed_in_fp32_alone(self, models, tokens):
        dtype, model, _ = models
        found = deviation(dtype, model, changed(model, lambda weight: weight * (1 + 2**-7)), tokens)
        assert found.explained == (dtype == torch.bfloat16)


def test_the_tolerance_by_hand():
    """100 tokens at −200 nats: bf16 2^-7 · 10 + 200 · 2^-23, fp32 2^-16 · 10 + the same; no tokens, no slack."""
    sums, tokens = torch.tensor([-200.0, 0.0]), torch.tensor([100.0, 0.0])
    assert tolerance(sums, tokens, torch.bfloat16).tolist() == pytest.approx([0.0781488, 0], rel=1e-5)
    assert tolerance(sums, tokens, torch.float32).tolist() == pytest.approx([1.76430e-4, 0], rel=1e-4)
    assert tolerance(sums, tokens, torch.float64).tolist() == tolerance(sums, tokens, torch.float32).tolist()


@pytest.mark.parametrize(
    ("kind", "noise"),
    [
        ("hunyuan_v1_dense", {"attention_dropout": 0.1}),
        ("seed_oss", {"attention_dropout": 0.1, "residual_dropout": 0.1}),
        ("qwen2", {"attention_dropout": 0.1}),
        ("mixtral", {"router_jitter_noise": 0.1, "num_local_experts": 4}),
        ("falcon", {"attention_dropout": 0.1, "hidden_dropout": 0.1}),
        ("persimmon", {"attention_dropout": 0.1, "hidden_dropout": 0.1}),
    ],
)
def test_no_model_draws_at_random_in_training(kind, noise):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, **({} if kind == "falcon" else {"head_dim": 8})}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads, **noise)).train()
    ids = torch.arange(3, 27)[None]
    disable_dropout_in_model(model)  # TRL's, which comes with ours
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model, None)
    assert torch.equal(model(ids).logits, model(ids).logits)
