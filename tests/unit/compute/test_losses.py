"""Losses against the code of the installed TRL, 1.9 to 1.16, and against values derived by hand."""

import math
from functools import cache
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from dpo_plugin.compute.batching import PairCollator, to_pair_batch
from dpo_plugin.compute.lm_head import ForwardOptions
from dpo_plugin.compute.logps import completion_logps, pair_logps, single_losses, total_loss
from dpo_plugin.compute.loss_traits import traits_of
from dpo_plugin.compute.losses import LOSSES, LossOptions, score
from dpo_plugin.types import PairLogps

pytestmark = pytest.mark.core


def logps(pc, pr, rc, rr, beta=1.0, tokens=(1.0, 1.0)) -> PairLogps:
    values = [torch.tensor([float(v)]) for v in (pc, pr, rc, rr, *tokens, 0, 0)]
    return PairLogps(*values, beta=beta)


DIVERGENT = ("discopop", "exo_pair", "hinge", "ipo", "robust", "sft", "sigmoid", "sigmoid_norm")


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_what_it_declares(name):
    """Whether its values for three pairs are those of each alone, change with ε, and take a divergence."""
    columns = [[-5, -6, -9], [-7, -6.5, -8], [-6, -6.2, -7], [-6.5, -6.1, -9], [2, 3, 4], [4, 3, 5], [0] * 3, [0] * 3]
    rows = [torch.tensor([float(value) for value in column]) for column in columns]
    together, alone = PairLogps(*rows, beta=0.5), [PairLogps(*(row[[n]] for row in rows), beta=0.5) for n in range(3)]
    loss, traits = LOSSES[name], traits_of(LOSSES[name])

    def differs(one, other):
        return not torch.allclose(one, other, atol=1e-6)

    smoothed = LossOptions(beta=0.5, label_smoothing=0.1)
    assert traits.couples_pairs == differs(loss(together, smoothed), torch.cat([loss(one, smoothed) for one in alone]))
    more = smoothed.model_copy(update={"label_smoothing": 0.3})
    assert traits.uses_label_smoothing == differs(loss(together, smoothed), loss(together, more))
    without = loss(together, LossOptions(beta=0.5))
    assert traits.needs_label_smoothing == (not without.isfinite().all())
    assert traits.takes_divergence == (name in DIVERGENT)
    other = smoothed.model_copy(update={"f_divergence": "forward_kl"})
    assert differs(loss(together, smoothed), loss(together, other)) == (name in DIVERGENT and name != "sft")


def test_beta_multiplies_the_log_ratio_difference():
    """Δ = (−5 + 6) − (−7 + 6) = 2 at β = 1: −log σ(2) = log(1 + e^−2) = 0.1269."""
    loss = LOSSES["sigmoid"](logps(-5, -7, -6, -6), LossOptions(beta=1.0))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)
    assert loss.item() == pytest.approx(0.1269, abs=5e-5)


def test_policy_equal_to_reference_gives_ln_2():
    assert LOSSES["sigmoid"](logps(-5, -7, -5, -7), LossOptions(beta=0.1)).item() == pytest.approx(
        math.log(2), abs=1e-6
    )


@pytest.mark.parametrize(("tokens", "expected"), [((2, 4), 0.0625), ((1, 4), 0.0625), ((4, 1), 0.0625), ((1, 1), 1)])
def test_ipo_by_hand(tokens, expected):
    """β = 0.5, lengths 2 and 4: (1/2 − (−1)/4 − 1)² = (−1/4)²; 1 and 4: (1 + 1/4 − 1)²; 1 and 1: (1 + 1 − 1)²."""
    loss = LOSSES["ipo"](logps(-5, -7, -6, -6, tokens=tokens), LossOptions(beta=0.5))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_smoothed_sigmoid_by_hand():
    """Δ = 2, β = 1, ε = 0.1: 0.9 · 0.126928 + 0.1 · 2.126928 = 0.326928."""
    loss = LOSSES["sigmoid"](logps(-5, -7, -6, -6), LossOptions(beta=1.0, label_smoothing=0.1))
    assert loss.item() == pytest.approx(0.326928, abs=1e-5)


VOCABULARY = 11


class SaysLogits(torch.nn.Module):
    """A model that gives made logits; of TRL 1.16's fused head they are the hidden states, and its weight is 1."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits, text = logits, SimpleNamespace(model_type="made")
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.head = torch.nn.Linear(VOCABULARY, VOCABULARY, bias=False)
        self.head.weight = torch.nn.Parameter(torch.eye(VOCABULARY), requires_grad=False)
        if fuse := vars(dpo_trainer).get("add_fused_lm_head"):
            fuse(self, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))

    def get_output_embeddings(self):
        return self.head

    def base_model(self, **_):
        return SimpleNamespace(last_hidden_state=self.logits)

    def forward(self, **_):
        return SimpleNamespace(logits=self.logits)


def trl_loss(logits: torch.Tensor, ref: torch.Tensor, inputs: dict, **settings):
    """Drive TRL's `_compute_loss` with made logits and given reference log-probs."""
    usual = {
        "beta": 0.3, "label_smoothing": 0.0, "use_weighting": False, "ld_alpha": None,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5,
    }  # fmt: skip
    same = SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x, device="cpu")
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False,
        precompute_ref_logps=True, loss_weights=[1.0], args=SimpleNamespace(discopop_tau=0.05), _total_train_tokens=0,
        use_liger_kernel=False, _tp_size=1,
        _metrics={"train": mock.MagicMock()}, **{**usual, **settings},
    )  # fmt: skip
    batch = {**inputs, "ref_chosen_logps": ref[:, 0], "ref_rejected_logps": ref[:, 1]}
    return DPOTrainer._compute_loss(trainer, SaysLogits(logits), batch, False)


def collated(lengths):
    """A batch of pairs with completions of these lengths, for us and for TRL."""
    sizes = [{"prompt_ids": 3, "chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in lengths]
    rows = [{key: torch.randint(VOCABULARY, (size,)).tolist() for key, size in row.items()} for row in sizes]
    batch = to_pair_batch(PairCollator(0)(rows))
    mask = torch.zeros_like(batch.input_ids).flatten()
    mask[batch.logit_positions + 1] = 1
    return batch, {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "completion_mask": mask.view_as(batch.input_ids),
    }


@cache
def trl_keeps_constants() -> bool:
    """Those of a divergence, which TRL 1.9 leaves out: they cancel in a difference, and by length they do not.

    Restored by trl 6559; without them, equal policy and reference are not at ln 2.
    """
    batch, inputs = collated([(2, 4)])
    equal = torch.tensor([[2.0, 4.0]]) * -math.log(VOCABULARY)
    logits = torch.zeros(*batch.input_ids.shape, VOCABULARY)
    found = trl_loss(logits, equal, inputs, loss_types=["sigmoid_norm"], f_divergence_type="forward_kl")
    return math.isclose(found.item(), math.log(2), rel_tol=1e-6)


def compare_with_trl(name: str, wpo=False, ld_alpha=None, f_divergence="reverse_kl", f_alpha=0.5):
    torch.manual_seed(3)
    pairs, beta = 6, 0.3
    smoothing = 0.0 if name == "sigmoid" else 0.1  # TRL leaves sigmoid's label smoothing out
    batch, inputs = collated([(2 + pair % 4, 1 + pair * 2 % 5) for pair in range(pairs)])
    values = torch.randn(*batch.input_ids.shape, VOCABULARY)
    ref = torch.randn(pairs, 2) - 8

    theirs_in = values.clone().requires_grad_()
    theirs = trl_loss(
        theirs_in, ref, inputs, loss_types=[name], beta=beta, label_smoothing=smoothing, use_weighting=wpo,
        ld_alpha=ld_alpha, f_divergence_type=f_divergence, f_alpha_divergence_coef=f_alpha,
    )  # fmt: skip
    theirs.backward()

    ours_in = values.clone().requires_grad_()
    policy = completion_logps(ours_in, batch, ForwardOptions(wpo=wpo, ld_alpha=ld_alpha))
    options = LossOptions(beta=beta, label_smoothing=smoothing, f_divergence=f_divergence, f_alpha=f_alpha)
    values = single_losses(pair_logps(policy, ref, beta), {name: LOSSES[name]}, options)
    ours = total_loss(values, {name: 1.0}, policy.wpo_weights).mean()
    ours.backward()

    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, atol=1e-6, rtol=1e-5)
    return ours.item()


@pytest.mark.parametrize("wpo", [False, True])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_value_and_gradient_are_those_of_trl(name: str, wpo: bool):
    if wpo and name in {"aot", "aot_unpaired"}:
        pytest.skip("TRL refuses WPO with aot")
    if wpo and name in {"hinge", "sft"}:
        pytest.skip("TRL's in-place product breaks autograd for these under WPO")
    compare_with_trl(name, wpo)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_ld_alpha_is_that_of_trl(name: str):
    """The likelihood of `sft` has no pair to compare lengths with, and no token of it weighs less."""
    assert (compare_with_trl(name, ld_alpha=0.3) != compare_with_trl(name)) == (name != "sft")


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", sorted({*DIVERGENT} - {"sft"}))
def test_f_divergences_are_those_of_trl(name: str, divergence: str, alpha: float):
    if name in {"ipo", "sigmoid_norm"} and not trl_keeps_constants():
        pytest.skip("this TRL leaves out constants that do not cancel by length")
    found = compare_with_trl(name, f_divergence=divergence, f_alpha=alpha)
    plain = (divergence, alpha) == ("alpha_divergence", 1.0)
    assert (found == compare_with_trl(name)) == plain


BETA, EPSILON, NLL = 0.1, 0.1, 1.5
LN2 = math.log(2)
AT_REFERENCE = {
    "sigmoid": LN2,
    "sigmoid_norm": LN2,
    "hinge": 1,
    "ipo": (1 / (2 * BETA)) ** 2,
    "robust": LN2 * ((1 - EPSILON) - EPSILON) / (1 - 2 * EPSILON),
    "exo_pair": -LN2 - 0.5 * (math.log(1 - EPSILON) + math.log(EPSILON)),
    "nca_pair": LN2 + 0.5 * LN2 + 0.5 * LN2,
    "bco_pair": 2 * LN2,
    "sppo_hard": 2 * (0.5 / BETA) ** 2,
    "aot": LN2,
    "aot_unpaired": LN2,
    "apo_zero": 1 - 0.5 + 0.5,
    "apo_down": 0.5 + 1 - 0.5,
    "discopop": 0.5 * LN2 + 0.5,
    "sft": NLL,
}
"""Each loss where every log-ratio is 0: σ(0) = 1/2, −log σ(0) = ln 2; β = ε = 0.1."""


@pytest.mark.parametrize("lengths", [(20, 60), (60, 20), (1, 2048), (1, 1), (33, 33)])
@pytest.mark.parametrize(
    ("divergence", "alpha"),
    [("reverse_kl", 0.5), ("forward_kl", 0.5), ("js_divergence", 0.5)]
    + [("alpha_divergence", alpha) for alpha in (-1.0, 0.0, 0.3, 0.5, 0.999, 1.0, 2.0)],
)
@pytest.mark.parametrize("name", LOSSES)
def test_the_value_at_policy_equal_to_reference_is_known(name, divergence, alpha, lengths):
    """Whatever divergence and lengths: TRL 1.9 has `sigmoid_norm` 0.6965, `ipo` 25.67, `sppo_hard` 58 at 20 and 60."""
    sums = [-NLL * n for n in lengths]
    options = LossOptions(beta=BETA, label_smoothing=EPSILON, f_divergence=divergence, f_alpha=alpha)
    found = LOSSES[name](logps(*sums, *sums, tokens=lengths), options).item()
    assert found == pytest.approx(AT_REFERENCE[name], rel=1e-5)


@pytest.mark.parametrize("name", sorted({*LOSSES} - {*DIVERGENT}))
def test_a_loss_that_is_no_function_of_a_difference_takes_the_log_ratio(name):
    """Where log Z(x) does not cancel, a score has no meaning of its own; the config refuses the combination."""
    values = logps(-5, -7, -6, -6.5)
    found = {
        divergence: LOSSES[name](values, LossOptions(beta=0.5, f_divergence=divergence)).item()
        for divergence in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    }
    assert len(set(found.values())) == 1


@pytest.mark.parametrize(
    ("divergence", "alpha", "expected"),
    [
        ("reverse_kl", 0.5, 0.2),
        ("forward_kl", 0.5, 1 - math.exp(-0.2)),  # 1 − 1/u
        ("js_divergence", 0.5, math.log(2 * math.exp(0.2) / (1 + math.exp(0.2)))),  # log 2u/(1 + u)
        ("alpha_divergence", 0.5, (math.exp(-0.1) - 1) / -0.5),  # (u^(α−1) − 1)/(α − 1)
        ("alpha_divergence", 0.0, 1 - math.exp(-0.2)),
        ("alpha_divergence", 1.0, 0.2),
        ("alpha_divergence", 1.00001, 0.2),
    ],
)
def test_scores_by_hand(divergence, alpha, expected):
    """f′(u) − f′(1) at u = e^0.2, which is 0 at u = 1."""
    options = LossOptions(beta=0.1, f_divergence=divergence, f_alpha=alpha)
    found = score(torch.tensor([0.2, 0.0], dtype=torch.float64), options)
    assert found.tolist() == pytest.approx([expected, 0], abs=1e-5)


def test_completion_logps_are_summed_in_fp32():
    """bf16 logits: the sum over 200 tokens equals the fp64 sum of the same logits to 1e-3, not to bf16's 1e-2 of 300."""
    torch.manual_seed(0)
    row = torch.randint(50, (201,)).tolist()
    batch = to_pair_batch(PairCollator(0)([{"prompt_ids": row[:1], "chosen_ids": row[1:], "rejected_ids": row[1:]}]))
    logits = torch.randn(2, 201, 50).bfloat16()
    found = completion_logps(logits, batch)
    exact = logits[:, :-1].double().log_softmax(-1).gather(2, batch.input_ids[:, 1:, None]).sum((1, 2))
    assert found.sums.dtype == torch.float32
    assert (found.sums.double() - exact).abs().max() < 1e-3
    assert found.tokens.tolist() == [200, 200]
