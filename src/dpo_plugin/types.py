"""The named types that flow from a data row to the loss; ``pairs`` is always the leading dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Self, TypedDict, get_args

if TYPE_CHECKING:
    from torch import Tensor


class Message(TypedDict):
    """One message of a conversation, with the keys that chat templates read."""

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[Any]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A shared history and the two ways it goes on.

    Attributes:
        prompt: Messages that chosen and rejected share; the last one is not the assistant's.
        chosen: Messages after the prompt in the preferred conversation; ends with the assistant.
        rejected: The same for the other conversation.
        source: Where the row comes from, for metrics by source.
        tools: Tool definitions handed to the chat template.
        template_kwargs: Further arguments of the chat template, e.g. ``enable_thinking``.
    """

    prompt: Sequence[Message]
    chosen: Sequence[Message]
    rejected: Sequence[Message]
    source: str = ""
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RenderedPair:
    """A pair as text, after the chat template: ``prompt + chosen`` is what the model reads."""

    prompt: str
    chosen: str
    rejected: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Token ids of some pairs, in one of two layouts.

    Two rows: rows ``[0, pairs)`` are prompt + chosen, ``[pairs, 2 * pairs)`` prompt + rejected, padded on the right.
    Flat: one row, pair after pair, each as ``shared prefix | rest of chosen | rest of rejected``.

    A *side* is one completion: ``[0, pairs)`` the chosen ones, ``[pairs, 2 * pairs)`` the rejected ones.

    Attributes:
        input_ids: (rows, length) token ids.
        logit_positions: (tokens,) positions in ``input_ids.flatten()`` whose output predicts a completion token.
        labels: (tokens,) the completion tokens.
        lengths: Completion tokens of each side; in ``logit_positions`` and ``labels`` they follow each other.
        beyond_shorter: (tokens,) whether it lies beyond the length of its pair's shorter completion.
        num_pairs: Number of pairs.
        attention_mask: (rows, length), 1 where a token is; two rows only.
        position_ids: (1, length); flat only.
        segments: Tokens of prefix, rest of chosen and rest of rejected for each pair; flat only.
        sources: One source per pair.
        row_hashes: One digest of the exact token ids per pair, for the cache of reference log-probs.
    """

    input_ids: Tensor
    logit_positions: Tensor
    labels: Tensor
    lengths: Sequence[int]
    beyond_shorter: Tensor
    num_pairs: int
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    segments: Sequence[tuple[int, int, int]] = ()
    sources: Sequence[str] = ()
    row_hashes: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class CompletionLogps:
    """What one forward says of the completions, each (2 * pairs,), sides as in `PairBatch`, fp32 or the model's fp64.

    Attributes:
        sums: Log-probability of the completion in nats, summed over its tokens.
        tokens: Number of completion tokens.
        mean_logits: Mean logit over vocabulary and completion tokens.
        wpo_weights: WPO weight exp(mean aligned log-probability), or None if not asked for.
        entropy: Mean entropy of the next token's distribution, nats per completion token, or None if not asked for.
        unweighted: The sums with every token counted once, or None where ``sums`` are just that (no ``ld_alpha``).
        router_aux: The routers' load-balancing loss over the tokens of both rows of every pair, scalar (Fedus et al.
            2021, arXiv 2101.03961, eq. 4 to 6), or None if not asked for.
    """

    sums: Tensor
    tokens: Tensor
    mean_logits: Tensor
    wpo_weights: Tensor | None = None
    entropy: Tensor | None = None
    unweighted: Tensor | None = None
    router_aux: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PairLogps:
    """All that losses and metrics see of a batch; every tensor is (pairs,) fp32.

    Attributes:
        policy_chosen_logps: log π(chosen | prompt) in nats, summed over completion tokens.
        policy_rejected_logps: log π(rejected | prompt), likewise.
        ref_chosen_logps: log π_ref(chosen | prompt), no gradient.
        ref_rejected_logps: log π_ref(rejected | prompt), no gradient.
        chosen_tokens: Completion length of chosen in tokens.
        rejected_tokens: Completion length of rejected in tokens.
        chosen_logits: Mean policy logit over chosen's completion, no gradient.
        rejected_logits: The same for rejected.
        beta: Strength of the tie to the reference (Rafailov et al. 2023, eq. 7).
        sources: One source per pair.
        chosen_entropy: Mean entropy of the policy over chosen's completion, nats per token, no gradient; None if it was
            not computed.
        rejected_entropy: The same for rejected.
        unweighted: log π(chosen | prompt) with every token counted once, or None without ``ld_alpha``.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_logits: Tensor
    rejected_logits: Tensor
    beta: float
    sources: Sequence[str] = ()
    chosen_entropy: Tensor | None = None
    rejected_entropy: Tensor | None = None
    unweighted: Tensor | None = None

    @property
    def policy_chosen_unweighted(self) -> Tensor:
        """Log π(chosen | prompt) in nats, summed with every token counted once whatever ``ld_alpha``, (pairs,)."""
        return self.policy_chosen_logps if self.unweighted is None else self.unweighted

    def only(self, pairs: Sequence[int]) -> Self:
        """The same of some pairs alone, by index."""
        if len(pairs) == len(self.policy_chosen_logps):
            return self
        columns = {column.name: getattr(self, column.name) for column in fields(self)}
        picked = {name: column[pairs] for name, column in columns.items() if hasattr(column, "shape")}
        return replace(self, **picked, sources=[self.sources[n] for n in pairs] if self.sources else ())

    @property
    def chosen_logratios(self) -> Tensor:
        """Log π(chosen) − log π_ref(chosen), (pairs,) nats."""
        return self.policy_chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """Log π(rejected) − log π_ref(rejected), (pairs,) nats."""
        return self.policy_rejected_logps - self.ref_rejected_logps

    @property
    def chosen_rewards(self) -> Tensor:
        """Implicit reward β (log π − log π_ref) of chosen, (pairs,)."""
        return self.beta * self.chosen_logratios

    @property
    def rejected_rewards(self) -> Tensor:
        """Implicit reward β (log π − log π_ref) of rejected, (pairs,)."""
        return self.beta * self.rejected_logratios


# ── what health checks see and say ──

Severity = Literal["error", "warning"]
"""error: the run teaches nothing, or something else than was asked. warning: it would go better otherwise."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What is known of a run before its first step; None where it is not known.

    Attributes:
        beta: β.
        learning_rate: The peak learning rate.
        losses: Names of the losses.
        adapter_dtype: Dtype in which the optimizer updates the trained weights, e.g. ``float32``.
        lora_r: Rank of the adapter.
        trainable_share: Trained parameters / all parameters.
        sequence_len: Most tokens of prompt + completion.
        planned_steps: Optimizer steps that the run is to take.
        epochs: Epochs that the run is to take.
        starts_as_reference: Whether policy and reference have the same weights before the first step.
        reference_fixed: Whether the reference must stay as it is.
        base: The base model.
        policy: What is trained: the path of the adapter it starts from, a fresh LoRA, or all weights.
        reference: The reference strategy and its adapter.
        pairs: Training pairs.
        hardware: Processes and their device.
    """

    beta: float | None = None
    learning_rate: float | None = None
    losses: Sequence[str] = ()
    adapter_dtype: str | None = None
    lora_r: int | None = None
    trainable_share: float | None = None
    sequence_len: int | None = None
    planned_steps: int | None = None
    epochs: float | None = None
    starts_as_reference: bool | None = None
    reference_fixed: bool | None = None
    base: str | None = None
    policy: str | None = None
    reference: str | None = None
    pairs: int | None = None
    hardware: str | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Facts as they were written to JSON; keys of another version are passed over."""
        known = {entry.name for entry in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


@dataclass(frozen=True, slots=True)
class Finding:
    """What a health check found.

    Attributes:
        message: What was found, in a sentence.
        advice: What to change; ends with the line to write.
        severity: How bad it is.
        first_step: First step at which the check found it.
        numbers: The figures that show it.
        check: The check's registered name; filled in by `HealthMonitor`.
        last_step: Last step at which the check found it; filled in by `HealthMonitor`.
    """

    message: str
    advice: str
    severity: Severity = "warning"
    first_step: int = 0
    numbers: Mapping[str, float] = field(default_factory=dict)
    check: str = ""
    last_step: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A finding as it was written to JSON; unknown keys are skipped.

        Raises:
            TypeError: If ``message`` or ``advice`` is missing, or a field has the wrong type.
        """
        known = {entry.name for entry in fields(cls)}
        found = cls(**{key: value for key, value in values.items() if key in known})
        texts = all(isinstance(text, str) for text in (found.message, found.advice, found.check))
        steps = all(type(step) is int for step in (found.first_step, found.last_step))
        if not (texts and steps and isinstance(found.numbers, Mapping) and found.severity in get_args(Severity)):
            raise TypeError("not a finding")
        return found

    def text(self) -> str:
        """One line for the log."""
        return f"health: {self.check} ({self.severity}, since step {self.first_step}): {self.message}. {self.advice}"
