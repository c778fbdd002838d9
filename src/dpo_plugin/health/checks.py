"""The built-in health checks: each with its threshold, window, source and advice.

docs/health.md has the rules in words. Thresholds are set so that a run that learns triggers none of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from dpo_plugin.health import learning, sanity
from dpo_plugin.health.monitor import Check

DPO = "Rafailov et al. 2023, arXiv 2305.18290"
RAZIN = "Razin et al. 2024, arXiv 2410.08847"
PARK = "Park et al. 2024, arXiv 2403.19159"

CHECKS: Mapping[str, Check] = {
    "no_completion_tokens": Check(
        find=sanity.no_completion_tokens,
        severity="error",
        threshold=1.0,
        window=3,
        source="a published 72B run whose rows were cut at 32 tokens: log-probs 0, loss 0.6931 throughout",
        advice="Prompts fill the whole sequence length, so there is nothing to learn from. Give them room, or set "
        "`dpo_plugin.data.truncation_side: left`, which cuts prompts instead.",
    ),
    "pairs_mostly_cut": Check(
        find=sanity.mostly_cut,
        severity="warning",
        threshold=0.5,
        window=0,
        source="the data audit",
        advice="The run does not train on the data set that the config names, but on what is left of it.",
    ),
    "step_zero_identity": Check(
        find=sanity.step_zero,
        severity="error",
        threshold=0.5,
        window=0,
        source=f"{DPO}, eq. 7: every reward is 0 while policy = reference",
        advice="The reference is not what the policy started from, so rewards measure something else.",
    ),
    "not_finite": Check(
        find=sanity.not_finite,
        severity="error",
        threshold=2.0,
        window=0,
        source="IEEE 754; one skipped overflow is normal under fp16 loss scaling (Micikevicius et al. 2018, arXiv "
        "1710.03740)",
        advice="From here on the weights may be NaN; go back to the last checkpoint before that step.",
    ),
    "gradient_vanished": Check(
        find=sanity.gradient_vanished,
        severity="error",
        threshold=1e-7,
        window=5,
        source=f"{DPO}, section 4: the gradient is β σ(−margin) times that of the log-probs, and 0 only if no token or "
        "no trained weight takes part, or every pair is saturated",
        advice="Look at the number of trainable parameters that the run printed, and at `lora_target_modules`.",
    ),
    "gradient_exploded": Check(
        find=sanity.gradient_exploded,
        severity="warning",
        threshold=10.0,
        window=5,
        source=f"{DPO}, section 4: the weight σ(−margin) starts at 1/2 and cannot pass 1, so it can at most double the "
        "norm",
        advice="The policy is leaving the region in which it was trained.",
    ),
    "loss_diverged": Check(
        find=learning.loss_diverged,
        severity="error",
        threshold=1.5,
        window=10,
        source=f"{DPO}, eq. 7: where policy and reference agree the loss is ln 2, so 1.5 times that is worse than not "
        "having trained",
        advice="The policy has run away from the reference, and what it learned before is lost. Go back to an earlier "
        "checkpoint, with a smaller rate or a longer warm-up.",
    ),
    "loss_at_ln2": Check(
        find=learning.loss_at_ln2,
        severity="error",
        threshold=learning.AT_LN2,
        window=20,
        source=f"{DPO}, eq. 7: −log σ(0) = ln 2, so policy and reference still agree on every pair",
        advice="The updates do not move the policy. LoRA needs about ten times the learning rate of full fine-tuning.",
    ),
    "margin_not_rising": Check(
        find=learning.margin_not_rising,
        severity="warning",
        threshold=2.0,
        window=20,
        source=f"{DPO}, section 4: a step raises the margin of its own pairs",
        advice="Chosen and rejected do not separate, or separate the wrong way. Check with `axolotl dpo preview` that "
        "the columns are the right way round; then change the learning rate, or lower a β above 0.3.",
    ),
    "accuracy_at_chance": Check(
        find=learning.accuracy_at_chance,
        severity="warning",
        threshold=0.55,
        window=2,
        source="chance gives 0.5; 0.6 must be a standard error away, √(1/4n)",
        advice="What is learned does not carry over: labels may be noise (`dpo_label_smoothing`), the held-out data of "
        "another kind, or its columns the wrong way round.",
    ),
    "likelihood_displacement": Check(
        find=learning.likelihood_displacement,
        severity="warning",
        threshold=0.7,
        window=20,
        source=f"{RAZIN}; ln 2 ≈ 0.7 nats halve the probability of every token",
        advice="If the margin rises, it is only because rejected falls faster; the probability moves to other answers. "
        "Add the `sft` term, take `dpo_loss_type: [apo_zero]`, raise `rl_beta`, or drop pairs whose answers are almost "
        "identical.",
    ),
    "overfitting": Check(
        find=learning.overfitting,
        severity="warning",
        threshold=0.1,
        window=20,
        source="Azar et al. 2023, arXiv 2310.12036, section 4.2: where preferences are all but certain, β no longer "
        "holds the policy",
        advice="Keep the checkpoint at the minimum (`load_best_model_at_end`), and train fewer parameters or fewer "
        "epochs.",
    ),
    "length_exploitation": Check(
        find=learning.length_exploitation,
        severity="warning",
        threshold=0.5,
        window=20,
        source=PARK,
        advice="The policy learns length instead of preference. Use the length-normalised loss, or "
        "`dpo_plugin: {loss: {ld_alpha: 0.5}}`, which weights the surplus tokens down.",
    ),
    "saturated_pairs": Check(
        find=learning.saturated,
        severity="warning",
        threshold=0.9,
        window=20,
        source=f"{DPO}, section 4: such a pair's gradient is below a fiftieth of what it was at step 0",
        advice="The rest of the run costs time and moves the policy away from the reference for no gain.",
    ),
    "quantised_rewards": Check(
        find=sanity.quantised,
        severity="warning",
        threshold=12.0,
        window=10,
        source="bf16 keeps 8 binary digits: 2 nats between neighbouring log-probs at 300 nats",
        advice="Log-probabilities are summed in bf16 (TRL 1.9 to 1.14 under DeepSpeed and FSDP2). This plugin sums "
        "them in fp32.",
    ),
    "learning_rate_below_precision": Check(
        find=sanity.rate_below_precision,
        severity="warning",
        threshold=0.5,
        window=1,
        source="an AdamW update is about as large as the learning rate (Kingma & Ba 2014, arXiv 1412.6980, section "
        "2.1), and rounding to nearest drops what is below half the distance between neighbouring numbers: 2⁻⁹ of a "
        "weight in bf16, 2⁻²⁵ in fp32",
        advice="Let the optimizer update fp32 weights, as it does unless `master_weights: false` says otherwise; or "
        "raise the learning rate.",
    ),
    "reference_drift": Check(
        find=sanity.reference_drift,
        severity="error",
        threshold=0.01,
        window=2,
        source=f"{DPO}, eq. 7: π_ref is a constant",
        advice="Something trains or overwrites the reference: another plugin, a callback, or an optimizer over all "
        "parameters. Remove it, and name the reference.",
    ),
}
