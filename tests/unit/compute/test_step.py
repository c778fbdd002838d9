"""The step without axolotl: policy and reference, checks, loss, and what metrics get."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from dpo_plugin.compute.batching import PairCollator, to_pair_batch
from dpo_plugin.compute.lm_head import ForwardOptions
from dpo_plugin.compute.logps import run_model
from dpo_plugin.compute.losses import LossOptions, hinge, sigmoid
from dpo_plugin.compute.step import PreferenceStep, score_pairs
from dpo_plugin.errors import NotFiniteError, ReferenceMismatchError, RegistrationError
from dpo_plugin.model.adapter_config import AdapterFolder
from dpo_plugin.model.adapters import attach
from dpo_plugin.model.cache import CachedReference, ReferenceLogpCache
from dpo_plugin.model.references import AdapterReference
from tests.support import tiny

BETA = 0.25
ROWS = [{**tiny.example(8, 5 + n, 7, seed=n), "source": "ab"[n % 2]} for n in range(3)]
EVERY = [0, 1, 2]


@pytest.fixture
def model(base_dir, sft_dir):
    sft = AdapterFolder.open(sft_dir, "lora_model_dir")
    made = attach(AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32), sft, sft)
    made.train_only_policy()
    return made


@pytest.fixture
def batch():
    return to_pair_batch(PairCollator(0)(ROWS))


def step_of(model, cache=None, **fields):
    reference = CachedReference(AdapterReference(model), cache, on_any_rank=bool)
    usual = {
        "losses": {"sigmoid": sigmoid},
        "weights": {"sigmoid": 2.0},
        "loss_options": LossOptions(beta=BETA),
        "forward_options": ForwardOptions(entropy=True),
        "layers": [],
        "owner": lambda name: f"the owner of {name}",
        "locate": lambda batch, pair: f"for pair {pair} of {batch.sources[pair]}",
    }
    return PreferenceStep(reference, **(usual | fields))


def move(model):
    for _, parameter in model.policy_parameters():
        parameter.data += 0.05


def test_loss_and_log_probs_are_those_of_two_forwards(model, batch):
    move(model)
    result = step_of(model)(model, batch, EVERY, training=True)
    with torch.no_grad():
        policy = run_model(model, batch).sums.view(2, 3)
        with model.reference_active():
            reference = run_model(model, batch).sums.view(2, 3)
    margins = (policy - reference)[0] - (policy - reference)[1]
    assert margins.abs().min() > 1e-3
    torch.testing.assert_close(result.loss, -2 * logsigmoid(BETA * margins).mean())
    torch.testing.assert_close(result.logps.chosen_rewards, BETA * (policy - reference)[0])
    assert result.logps.chosen_entropy is not None
    assert result.logps.sources == ["a", "b", "a"]
    result.loss.backward()
    assert all(parameter.grad.norm() > 0 for name, parameter in model.policy_parameters() if "lora_B" in name)
    assert not [
        name for name, parameter in model.adapter_parameters() if parameter.grad is not None and ".reference." in name
    ]


def test_pairs_that_do_not_count_are_neither_in_the_loss_nor_in_metrics(model, batch):
    move(model)
    step = step_of(model)
    whole = step(model, batch, EVERY, training=False)
    alone = [step(model, to_pair_batch(PairCollator(0)([row])), [0], training=False).loss for row in ROWS]
    part = step(model, batch, [0, 2], training=False)
    torch.testing.assert_close(part.loss, (alone[0] + alone[2]) / 2)
    torch.testing.assert_close(whole.loss, sum(alone) / 3)
    assert torch.equal(part.logps.chosen_tokens, whole.logps.chosen_tokens[[0, 2]])
    nothing = step(model, batch, [], training=False)
    assert nothing.logps is None
    assert nothing.loss.requires_grad  # the other ranks' backward needs this one's


def test_several_losses_are_given_one_by_one(model, batch):
    """Each before its weight, of the pairs that count; nothing where the loss is one loss and nothing else."""
    move(model)
    both = step_of(model, losses={"sigmoid": sigmoid, "hinge": hinge}, weights={"sigmoid": 2.0, "hinge": 0.5})
    result = both(model, batch, [0, 2], training=True)
    assert set(result.losses) == {"sigmoid", "hinge"}
    assert not result.losses["hinge"].requires_grad
    torch.testing.assert_close(result.losses["hinge"], hinge(result.logps, LossOptions(beta=BETA)).detach())
    torch.testing.assert_close(result.loss, (2 * result.losses["sigmoid"] + result.losses["hinge"] / 2).mean())
    assert not both(model, batch, [], training=True).losses

    assert not step_of(model, weights={"sigmoid": 1.0})(model, batch, EVERY, training=True).losses
    weighted = step_of(model)(model, batch, EVERY, training=True)
    torch.testing.assert_close(weighted.loss, 2 * weighted.losses["sigmoid"].mean())
    wpo = step_of(model, weights={"sigmoid": 1.0}, forward_options=ForwardOptions(wpo=True))
    result = wpo(model, batch, EVERY, training=True)
    torch.testing.assert_close(result.losses["sigmoid"], sigmoid(result.logps, LossOptions(beta=BETA)).detach())
    assert result.loss < result.losses["sigmoid"].mean()


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda logps, options: logps.chosen_rewards.mean(), r"returned shape \(\) for 3 pairs, not .* shape \(3,\)"),
        (lambda logps, options: None, "returned NoneType for 3 pairs"),
        (lambda logps, options: logps.no_such_field, "raised AttributeError: .*no_such_field"),
        (lambda logps: logps.chosen_rewards, "raised TypeError: .*takes 1 positional argument"),
    ],
)
def test_a_loss_that_gives_no_value_per_pair_is_named_with_its_owner(model, batch, loss, says):
    step = step_of(model, losses={"mine": loss}, weights={"mine": 1.0})
    with pytest.raises(RegistrationError, match=rf"^loss 'mine' of the owner of mine {says}.*Write: dpo_loss_type: "):
        step(model, batch, EVERY, training=True)


class TestStepZero:
    def test_equal_weights_pass_once(self, model, batch):
        step = step_of(model, step_zero_dtype=torch.float32)
        assert step(model, batch, EVERY, training=True).loss.item() == pytest.approx(2 * math.log(2), abs=1e-6)
        assert step.step_zero_dtype is None
        move(model)
        step(model, batch, EVERY, training=True)

    def test_others_do_not(self, model, batch):
        move(model)
        step = step_of(model, step_zero_dtype=torch.float32)
        step(model, batch, EVERY, training=False)  # an evaluation checks nothing
        with pytest.raises(ReferenceMismatchError, match="every reward must be 0, but the largest is"):
            step(model, batch, EVERY, training=True)

    def test_the_reference_is_run_even_if_its_log_probs_are_cached(self, model, batch, tmp_path):
        cache = ReferenceLogpCache(tmp_path, "key")
        cache.put(batch.row_hashes, torch.zeros(3, 2))
        step = step_of(model, cache, step_zero_dtype=torch.float32)
        result = step(model, batch, EVERY, training=True)
        assert step.reference.fresh
        assert not result.logps.chosen_rewards.any()


def test_a_cached_reference_is_not_run(model, batch, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("dpo_plugin.compute.step.run_model", lambda *of: calls.append(of[2]) or run_model(*of))
    step = step_of(model, ReferenceLogpCache(tmp_path, "key"), forward_options=ForwardOptions(wpo=True, entropy=True))
    cold = step.reference_logps(model, batch)
    warm = step(model, batch, EVERY, training=True)
    assert calls == [replace(step.forward_options, wpo=False, entropy=False), step.forward_options]
    assert torch.equal(warm.logps.ref_chosen_logps, cold[:, 0])


@pytest.mark.parametrize(
    ("side", "says"), [("policy", "policy's log-probability of chosen"), ("reference", "reference's .* of chosen")]
)
def test_what_is_not_finite_is_named(model, batch, side, says):
    adapter = "default" if side == "policy" else "reference"
    weight = dict(model.named_parameters())[f"base_model.model.model.layers.0.mlp.down_proj.lora_B.{adapter}.weight"]
    weight.data[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match=f"the {says} is nan for pair 0 of a$"):
        step_of(model)(model, batch, EVERY, training=True)


def test_scores_need_no_step(model, batch):
    """What samples and the planner use: any forward and any reference."""
    given = torch.tensor([[-1.0, -2.0]] * 3)
    logps, policy = score_pairs(
        model, batch, lambda *of: run_model(*of, ForwardOptions(wpo=True)), lambda *_: given, BETA
    )
    assert torch.equal(logps.ref_rejected_logps, given[:, 1])
    assert policy.wpo_weights.shape == (6,)
