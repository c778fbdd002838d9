"""Preference losses as pure functions on `PairLogps`, under TRL 1.9's names.

β multiplies the log-ratio difference (Rafailov et al. 2023, arXiv 2305.18290, eq. 7). Below,
r_w and r_l are the log-ratios of chosen and rejected in nats, Δ = s_w − s_l the difference of their scores,
σ the logistic function, n_w and n_l the completion lengths in tokens, ε the label smoothing.

A score is f′(π/π_ref) − f′(1) (f-DPO, Wang et al. 2023, arXiv 2309.16240): the log-ratio itself for the reverse KL,
which is plain DPO, and always 0 where policy = reference. TRL 1.9 leaves the constants out; they cancel in s_w − s_l,
but not in s_w/n_w − s_l/n_l (restored by trl 6559). Losses written below with r take the log-ratio: a divergence's
reward has a term β log Z(x) beside the score, of which only a difference is free, so there it would have no meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_plugin.compute.loss_traits import LossTraits
from dpo_plugin.config import LossConfig
from dpo_plugin.types import PairLogps


class LossOptions(LossConfig):
    """Settings that losses share: the section ``loss``, and axolotl's ``rl_beta`` and ``dpo_label_smoothing``.

    Attributes:
        beta: β > 0.
        label_smoothing: ε, the assumed share of flipped preferences.
    """

    beta: float = Field(gt=0)
    label_smoothing: float = Field(default=0.0, ge=0)


PreferenceLoss = Callable[[PairLogps, LossOptions], Tensor]

EXPONENT_LIMIT = 80.0
"""Largest exponent of the α-divergence, so that its exponential stays finite in fp32; TRL has the same."""


def score(logratios: Tensor, options: LossOptions) -> Tensor:
    """f′(u) − f′(1), u = π/π_ref, (pairs,), from log-ratios r = log u in nats.

    reverse KL: r. forward KL: 1 − 1/u. Jensen-Shannon: log(2u/(1+u)). α-divergence: (u^(α−1) − 1)/(α−1), which is the
    reverse KL at α = 1 and the forward KL at α = 0 (f-DPO, arXiv 2309.16240; α as in TRL).
    """
    if options.f_divergence == "forward_kl":
        return -torch.expm1(-logratios)
    if options.f_divergence == "js_divergence":
        return math.log(2) + logsigmoid(logratios)
    # TRL's bound, at which the two forms differ by 1e-6 · r²/2: it does not matter on which side it falls.
    if options.f_divergence == "alpha_divergence" and abs(options.f_alpha - 1) >= 1e-6:
        power = options.f_alpha - 1
        return torch.expm1((power * logratios).clamp(max=EXPONENT_LIMIT)) / power
    return logratios


def _scores(logps: PairLogps, options: LossOptions) -> tuple[Tensor, Tensor]:
    return score(logps.chosen_logratios, options), score(logps.rejected_logratios, options)


def _delta(logps: PairLogps, options: LossOptions) -> Tensor:
    chosen, rejected = _scores(logps, options)
    return chosen - rejected


def _per_token_delta(logps: PairLogps, options: LossOptions) -> Tensor:
    chosen, rejected = _scores(logps, options)
    return chosen / logps.chosen_tokens.clamp(min=1) - rejected / logps.rejected_tokens.clamp(min=1)


@LossTraits(uses_label_smoothing=True, takes_divergence=True)
def sigmoid(logps: PairLogps, options: LossOptions) -> Tensor:
    """−(1−ε) log σ(βΔ) − ε log σ(−βΔ): DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7). (pairs,).

    ε > 0 is conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences"), which TRL 1.9 leaves out.
    """
    return _smoothed(options.beta * _delta(logps, options), options.label_smoothing)


@LossTraits(takes_divergence=True)
def sigmoid_norm(logps: PairLogps, options: LossOptions) -> Tensor:
    """−log σ(β (s_w/n_w − s_l/n_l)): length-normalised DPO (Tülu 3, arXiv 2411.15124). (pairs,)."""
    return -logsigmoid(options.beta * _per_token_delta(logps, options))


@LossTraits(takes_divergence=True)
def hinge(logps: PairLogps, options: LossOptions) -> Tensor:
    """max(0, 1 − β Δ): SLiC-style hinge (Zhao et al. 2023, arXiv 2305.10425; RSO, arXiv 2309.06657). (pairs,)."""
    return torch.relu(1 - options.beta * _delta(logps, options))


@LossTraits(takes_divergence=True)
def ipo(logps: PairLogps, options: LossOptions) -> Tensor:
    """(s_w/n_w − s_l/n_l − 1/(2β))²: IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17), per token. (pairs,)."""
    return (_per_token_delta(logps, options) - 1 / (2 * options.beta)) ** 2


@LossTraits(uses_label_smoothing=True, takes_divergence=True)
def robust(logps: PairLogps, options: LossOptions) -> Tensor:
    """[−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε): robust DPO (Chowdhury et al. 2024, arXiv 2403.00409). (pairs,)."""
    epsilon, margin = options.label_smoothing, options.beta * _delta(logps, options)
    return (-(1 - epsilon) * logsigmoid(margin) + epsilon * logsigmoid(-margin)) / (1 - 2 * epsilon)


@LossTraits(uses_label_smoothing=True, needs_label_smoothing=True, takes_divergence=True)
def exo_pair(logps: PairLogps, options: LossOptions) -> Tensor:
    """KL(softmax(β s) ‖ (1−ε, ε)): EXO (Ji et al. 2024, arXiv 2402.00856, eq. 16); ε > 0. (pairs,)."""
    margin = options.beta * _delta(logps, options)
    epsilon = margin.new_tensor(options.label_smoothing)
    chosen = torch.sigmoid(margin) * (logsigmoid(margin) - torch.log1p(-epsilon))
    return chosen + torch.sigmoid(-margin) * (logsigmoid(-margin) - torch.log(epsilon))


@LossTraits()
def nca_pair(logps: PairLogps, options: LossOptions) -> Tensor:
    """−log σ(β r_w) − ½ log σ(−β r_w) − ½ log σ(−β r_l): NCA (Chen et al. 2024, arXiv 2402.05369). (pairs,)."""
    chosen, rejected = options.beta * logps.chosen_logratios, options.beta * logps.rejected_logratios
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


@LossTraits()
def bco_pair(logps: PairLogps, options: LossOptions) -> Tensor:
    """−log σ(β r_w) − log σ(−β r_l): BCO without shift (Jung et al. 2024, arXiv 2404.04656). (pairs,)."""
    return -logsigmoid(options.beta * logps.chosen_logratios) - logsigmoid(-options.beta * logps.rejected_logratios)


@LossTraits()
def sppo_hard(logps: PairLogps, options: LossOptions) -> Tensor:
    """(r_w − 1/(2β))² + (r_l + 1/(2β))²: SPPO, hard labels (Wu et al. 2024, arXiv 2405.00675, eq. 4.7). (pairs,)."""
    half = 0.5 / options.beta
    return (logps.chosen_logratios - half) ** 2 + (logps.rejected_logratios + half) ** 2


@LossTraits(couples_pairs=True, uses_label_smoothing=True)
def aot(logps: PairLogps, options: LossOptions) -> Tensor:
    """AOT, paired (Melnyk et al. 2024, arXiv 2406.05882): DPO on separately sorted margins. (pairs,)."""
    policy, _ = torch.sort(logps.policy_chosen_logps - logps.policy_rejected_logps)
    reference, _ = torch.sort(logps.ref_chosen_logps - logps.ref_rejected_logps)
    return _smoothed(options.beta * (policy - reference), options.label_smoothing)


@LossTraits(couples_pairs=True, uses_label_smoothing=True)
def aot_unpaired(logps: PairLogps, options: LossOptions) -> Tensor:
    """AOT, unpaired (Melnyk et al. 2024, arXiv 2406.05882): DPO on separately sorted log-ratios. (pairs,)."""
    chosen, _ = torch.sort(logps.chosen_logratios)
    rejected, _ = torch.sort(logps.rejected_logratios)
    return _smoothed(options.beta * (chosen - rejected), options.label_smoothing)


def _smoothed(margin: Tensor, epsilon: float) -> Tensor:
    return -(1 - epsilon) * logsigmoid(margin) - epsilon * logsigmoid(-margin)


@LossTraits()
def apo_zero(logps: PairLogps, options: LossOptions) -> Tensor:
    """1 − σ(β r_w) + σ(β r_l): APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7). (pairs,)."""
    chosen = 1 - torch.sigmoid(options.beta * logps.chosen_logratios)
    return chosen + torch.sigmoid(options.beta * logps.rejected_logratios)


@LossTraits()
def apo_down(logps: PairLogps, options: LossOptions) -> Tensor:
    """σ(β r_w) + 1 − σ(β (r_w − r_l)): APO-down (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8). (pairs,).

    TRL 1.9 gives the second term scores of the divergence and the first log-ratios (trl 6441); eq. 5 defines both by r.
    """
    margin = logps.chosen_logratios - logps.rejected_logratios
    return torch.sigmoid(options.beta * logps.chosen_logratios) + 1 - torch.sigmoid(options.beta * margin)


@LossTraits(takes_divergence=True)
def discopop(logps: PairLogps, options: LossOptions) -> Tensor:
    """(1−m) (−log σ(βΔ)) + m exp(−βΔ), m = σ(βΔ/τ): DiscoPOP (Lu et al. 2024, arXiv 2406.08414, eq. 5). (pairs,)."""
    margin = options.beta * _delta(logps, options)
    blend = torch.sigmoid(margin / options.discopop_tau)
    return -logsigmoid(margin) * (1 - blend) + torch.exp(-margin) * blend


@LossTraits(couples_pairs=True, takes_divergence=True)
def sft(logps: PairLogps, options: LossOptions) -> Tensor:
    """Mean negative log-likelihood per chosen token of the batch, the same for each pair (TRL's `sft`). (pairs,).

    Every token counts the same, whatever ``ld_alpha``: LD-DPO weights the implicit reward, of which this has none.
    """
    mean = -logps.policy_chosen_unweighted.sum() / logps.chosen_tokens.sum().clamp(min=1)
    return mean.expand_as(logps.policy_chosen_logps)


LOSSES: Mapping[str, PreferenceLoss] = {
    loss.__name__: loss
    for loss in (
        sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard,
        aot, aot_unpaired, apo_zero, apo_down, discopop, sft,
    )
}  # fmt: skip
