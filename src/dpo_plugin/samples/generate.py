"""Answers of policy and reference to the same prompts, and the implicit reward of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from dpo_plugin.compute.batching import PairCollator, to_pair_batch
from dpo_plugin.compute.lm_head import ForwardOptions
from dpo_plugin.compute.logps import run_model, unwrapped
from dpo_plugin.compute.step import score_pairs
from dpo_plugin.model.adapters import PolicyReferenceModel
from dpo_plugin.model.references import ReferenceStrategy
from dpo_plugin.samples.prompts import user_turn
from dpo_plugin.samples.records import Answer, Sample
from dpo_plugin.types import CompletionLogps, PairBatch


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How answers are generated.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        stop_ids: Ids that end an answer.
        pad_token_id: Id that fills the left of short prompts.
        temperature: 0 takes the likeliest token each time; above 0, tokens are drawn.
        seed: Seed of that draw.
        top_p: Share of the probability that tokens are drawn from (Holtzman et al. 2020).
        at_once: Prompts that are answered in one batch, which bounds the memory of the key-value cache.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_token_id: int
    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0
    at_once: int = 8


def generate(model: Any, prompts: Sequence[Sequence[int]], options: AnswerOptions) -> list[list[int]]:
    """Answer prompts, with the token that ended each; the model's own sampling defaults are not used.

    The run's random numbers stay as they are: greedy answers draw none, others draw from a state of their own. The
    model is in eval mode.

    Returns:
        Token ids per prompt; the last one is a stop id unless the answer was cut at ``max_new_tokens``.
    """
    found: list[list[int]] = []
    device = next(model.parameters()).device
    forked = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(forked, enabled=options.temperature > 0), _settings(model, options):
        if options.temperature > 0:
            torch.manual_seed(options.seed)
        for start in range(0, len(prompts), options.at_once):
            some = [torch.tensor(prompt, device=device) for prompt in prompts[start : start + options.at_once]]
            ids = pad_sequence(some, True, options.pad_token_id, padding_side="left")
            mask = pad_sequence([torch.ones_like(prompt) for prompt in some], True, padding_side="left")
            whole = model.generate(input_ids=ids, attention_mask=mask, use_cache=True)
            found += [_until_stop(answer, options.stop_ids) for answer in whole[:, ids.shape[1] :].tolist()]
    return found


@contextmanager
def _settings(model: Any, options: AnswerOptions) -> Iterator[None]:
    """Replace the model's generation settings; those passed to ``generate`` would be mixed with its own."""
    drawn = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": options.top_p}
    before = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        eos_token_id=list(options.stop_ids),
        pad_token_id=options.pad_token_id,
        **(drawn if options.temperature > 0 else {"do_sample": False}),
    )
    try:
        yield
    finally:
        model.generation_config = before


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Cut ids behind the first stop id."""
    return ids[: next((place + 1 for place, token in enumerate(ids) if token in stop_ids), None)]


@dataclass(frozen=True)
class Sampler:
    """Lets policy and reference answer, one after the other on the same base model.

    Attributes:
        flat: Whether the model's attention is that of the flat layout.
        chunk: Completion tokens whose logits are held at a time when answers are scored.
    """

    strategy: ReferenceStrategy
    tokenizer: Any
    options: AnswerOptions
    beta: float
    flat: bool = False
    chunk: int | None = None

    def __call__(self, model: Any, prompts: Sequence[Sequence[int]], step: int | None = None) -> list[Sample]:
        """Answer each prompt twice, as policy and as reference, and score both answers.

        The policy, which no engine wraps, is put into eval mode, in which transformers checkpoints no layer and keeps
        its cache, and put back.
        """
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                policy = generate(generator_of(model), prompts, self.options)
                with self.strategy.active(model) as other:
                    reference = (
                        None if other is None else generate(generator_of(unwrapped(other)), prompts, self.options)
                    )
                rewards = self.rewards(model, prompts, policy, reference or policy)
        finally:
            model.train(training)
        samples = []
        others: Sequence[list[int] | None] = reference or [None] * len(prompts)
        for prompt, own, other, (first, second) in zip(prompts, policy, others, rewards, strict=True):
            text = self.tokenizer.decode(prompt)
            theirs = None if other is None else self._answer(other, second)
            samples.append(Sample(step, text, self._answer(own, first), theirs, user_turn(text, self.tokenizer)))
        return samples

    def rewards(
        self, model: Any, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]
    ) -> list[tuple[float, float]]:
        """β (log π − log π_ref) of two answers per prompt, their stop token included where there is one.

        One prompt at a time, since answers may be as long as ``max_new_tokens`` allows.
        """
        collate = PairCollator(self.options.pad_token_id, flat=self.flat)
        device = next(model.parameters()).device
        found = []
        for prompt, one, other in zip(prompts, first, second, strict=True):
            fields = collate([{"prompt_ids": prompt, "chosen_ids": one, "rejected_ids": other}])
            batch = to_pair_batch({name: x.to(device) if isinstance(x, Tensor) else x for name, x in fields.items()})
            logps, _ = score_pairs(model, batch, self._forward, self._reference, self.beta)
            found.append((self.beta * float(logps.chosen_logratios), self.beta * float(logps.rejected_logratios)))
        return found

    def _forward(self, model: Any, batch: PairBatch) -> CompletionLogps:
        return run_model(model, batch, ForwardOptions(chunk=self.chunk))

    def _reference(self, model: Any, batch: PairBatch) -> Tensor:
        return self.strategy.logps(model, batch, self._forward)

    def _answer(self, ids: list[int], reward: float) -> Answer:
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Answer(text, len(ids), ids[-1] in self.options.stop_ids, reward)


def generator_of(model: Any) -> Any:
    """Get the model whose ``generate`` runs; of a PEFT model the base, which holds the adapter layers."""
    return model.get_base_model() if isinstance(model, PolicyReferenceModel) else model
