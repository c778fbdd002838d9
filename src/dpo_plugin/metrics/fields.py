"""What each logged field means and what it should do, for people who read a run for the first time."""

from __future__ import annotations

FIELDS: dict[str, str] = {
    "loss": "What is minimised. The default loss starts at ln 2 = 0.6931, where policy and reference agree, and should "
    "fall.",
    "loss/sigmoid": "DPO's loss alone, before its weight. Starts at ln 2 = 0.6931, where policy and reference agree, "
    "and should fall.",
    "loss/sft": "Negative log-likelihood of chosen alone, before its weight, nats per token. Should fall, or hold.",
    "loss/router_aux": "The routers' load-balancing loss alone, before its weight. Should hold.",
    "grad_norm": "Length of the gradient before clipping. Should stay within a few times its first values; 0 "
    "means that nothing is learned.",
    "learning_rate": "Step size of the optimizer. Rises in the warm-up, then follows the schedule.",
    "epoch": "How often the data has been seen.",
    "rewards/chosen": "β times the log-ratio of policy and reference on the preferred answer. Should rise, or hold.",
    "rewards/rejected": "β times the log-ratio on the rejected answer. Should fall below the reward of chosen.",
    "rewards/accuracies": "Share of pairs whose preferred answer has the higher reward. Should rise well above 0.5; at "
    "step 0 nothing is ranked, both rewards being 0.",
    "rewards/margins": "Reward of chosen minus reward of rejected. Starts at 0 and should rise.",
    "rewards/margins_p10": "Margin that a tenth of the pairs stay below. Should follow the mean upwards in the end.",
    "rewards/margins_p50": "Margin of the pair in the middle. Should rise with the mean; if not, few pairs carry it.",
    "rewards/margins_p90": "Margin that a tenth of the pairs exceed. Should not run away from the rest.",
    "rewards/negative_margins": "Share of pairs that are ranked the wrong way round. Should fall.",
    "rewards/saturated": "Share of pairs with σ(margin) > 0.99, which teach nothing more. Should rise late, if at all.",
    "rewards/count": "Pairs that the line is a mean of.",
    "logps/chosen": "Log-probability of the whole preferred answer in nats. Should not fall much.",
    "logps/rejected": "Log-probability of the whole rejected answer in nats. May fall.",
    "logps/chosen_per_token": "Log-probability of chosen per token in nats. Should not fall much.",
    "logps/rejected_per_token": "Log-probability of rejected per token in nats. May fall.",
    "logps/chosen_displacement": "Change of chosen's log-probability since step 0, nats per token. Should stay near 0 "
    "or above; −0.7 means that every token is half as likely.",
    "logps/rejected_displacement": "Change of rejected's log-probability since step 0, nats per token. Should fall, "
    "and further than chosen.",
    "logratios/chosen": "log π − log π_ref of the preferred answer in nats, before β. Should rise, or hold.",
    "logratios/rejected": "log π − log π_ref of the rejected answer in nats, before β. Should fall.",
    "logratios/margin_per_token": "Margin in nats per token, before β. Should rise; if only the margin rises, length "
    "is being learned.",
    "logits/chosen": "Mean logit over the tokens of chosen. Should drift slowly.",
    "logits/rejected": "Mean logit over the tokens of rejected. Should drift as chosen's does.",
    "lengths/chosen": "Tokens of the preferred answer. A property of the data; should hold.",
    "lengths/rejected": "Tokens of the rejected answer. Should hold as well.",
    "lengths/margin_correlation": "Correlation of the margin with the difference in length, −1 to 1. Should stay "
    "well below 0.5; above it, length may be what is learned.",
    "lengths/accuracy_chosen_longer": "Accuracy where the preferred answer is the longer one. Should rise.",
    "lengths/accuracy_chosen_shorter": "Accuracy where the preferred answer is the shorter one. Should rise as well.",
    "entropy/chosen": "How undecided the policy is on chosen's tokens, nats per token. Should fall slowly, not to 0.",
    "entropy/rejected": "How undecided the policy is on rejected's tokens, nats per token.",
    "adapter/distance": "Length of the difference between policy and reference adapter, in weights. Starts at 0 where "
    "the policy starts from the reference, and grows ever more slowly.",
    "adapter/update_norm": "How far the policy adapter moved since the line before. Follows the learning rate; 0 means "
    "that nothing is learned.",
    "weights/changed": "Share of the trained values, embeddings aside, that are no longer what they were at the start. "
    "Should be 1 or nearly so; near 0 the updates are rounded away.",
    "speed/pairs_per_second": "Pairs trained on per second, over all ranks, evaluation and saving included.",
    "speed/tokens_per_second": "Tokens per second that the policy computed, over all ranks; shared prompts count once.",
    "speed/shared_tokens": "Share of the tokens that sharing a pair's prompt spared. A property of the data.",
    "speed/reference_cache_hits": "Share of the pairs whose reference log-probs came from the cache. Should be 1 "
    "from the second epoch on if reference.cache is set.",
    "samples/win_rate": "Share of the sampled prompts to which the policy's answer has the higher score, ties counted "
    "half. Starts near 0.5 and should rise.",
    "samples/score": "Mean score of the policy's answers to the sampled prompts. Should rise.",
    "samples/divergence": "KL of policy and reference in nats per token, from the policy's own answers. Grows with "
    "what is learned; large without a better win rate, the policy has drifted.",
    "memory/peak_gib": "Highest memory of a GPU since the start, in GiB.",
    "runtime": "Seconds that the evaluation took.",
    "samples_per_second": "Pairs per second of the evaluation.",
    "steps_per_second": "Batches per second of the evaluation.",
}
"""Field → meaning and what it should do; evaluation's fields mean the same, on held-out pairs."""


def explain(name: str) -> str:
    """Look up the sentence of a logged field; empty for one that is not ours."""
    bare = name.removeprefix("eval_")
    sentence = FIELDS.get(bare, "")
    if not sentence and bare.count("/") > 1:
        kind, measure, source = bare.split("/", 2)
        group = FIELDS.get(f"{kind}/{measure}")
        sentence = f"Of the source {source} alone: {group}" if group else ""
    if not sentence and bare.startswith("loss/"):
        sentence = f"The loss {bare.removeprefix('loss/')} alone, before its weight."
    return f"Held-out data: {sentence[0].lower()}{sentence[1:]}" if sentence and bare != name else sentence
