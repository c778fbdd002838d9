"""The named types that flow from a data row to the loss; ``pairs`` is always the leading dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

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
    """Pairs as two padded rows each: rows ``[0, pairs)`` are chosen, ``[pairs, 2 * pairs)`` rejected.

    Attributes:
        input_ids: (2 * pairs, length) token ids.
        attention_mask: (2 * pairs, length), 1 where a token is.
        completion_mask: (2 * pairs, length), 1 on completion tokens.
        sources: One source per pair.
        keys: One digest of the exact token ids per pair, for the store of reference log-probs.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    sources: Sequence[str] = ()
    keys: Sequence[bytes] = ()

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return self.input_ids.shape[0] // 2


@dataclass(frozen=True, slots=True)
class CompletionLogps:
    """What one forward says of the completions, each (rows,) fp32, rows as in `PairBatch`.

    Attributes:
        sums: Log-probability of the completion in nats, summed over its tokens.
        tokens: Number of completion tokens.
        mean_logits: Mean logit over vocabulary and completion tokens.
        wpo_weights: WPO weight exp(mean aligned log-probability), or None if not asked for.
    """

    sums: Tensor
    tokens: Tensor
    mean_logits: Tensor
    wpo_weights: Tensor | None = None


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
