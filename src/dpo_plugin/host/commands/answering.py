"""The models that answer in ``axolotl dpo pairs``: policy, reference and base, loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from axolotl.cli.config import plugin_set_cfg
from axolotl.loaders import load_tokenizer
from axolotl.train import setup_model_and_tokenizer, setup_reference_model
from transformers import AutoConfig

from dpo_plugin.errors import ConfigError
from dpo_plugin.host.batches import attach_adapters
from dpo_plugin.host.plugin import DPOPlugin
from dpo_plugin.host.settings import RunSettings
from dpo_plugin.host.templates import render_prompt, renderer_of
from dpo_plugin.model.adapters import PolicyReferenceModel
from dpo_plugin.model.references import BaseReference
from dpo_plugin.samples.generate import AnswerOptions, generate, generator_of
from dpo_plugin.samples.pairing import ScoredAnswer
from dpo_plugin.samples.prompts import Prompt

MODELS = ("policy", "reference", "base")


@dataclass(frozen=True)
class Answering:
    """The loaded models.

    Attributes:
        policy: The policy, in eval mode; of a LoRA, all three on one base.
        second: In full fine-tuning, the base, where it is asked for.
        settings: The run's settings.
        autocast: Context in which the run computes.
    """

    policy: Any
    second: Any
    settings: RunSettings
    autocast: AbstractContextManager[Any]

    @classmethod
    def load(cls, cfg: Any, settings: RunSettings, policy: Path | None, models: Sequence[str]) -> Answering:
        """Load the base once; in full fine-tuning the policy, and the base if it is to answer.

        Args:
            cfg: The host's config.
            settings: The run's settings, with the adapter that is the policy.
            policy: In full fine-tuning, the folder of the policy, or None for the base.
            models: Who is to answer.

        Raises:
            ConfigError: If the reference is to answer and is no model, or one that a checkpoint alone has.
        """
        kind = settings.reference.strategy
        if "reference" in models and (kind.moves or not kind.runs_model):
            why = "moves in training" if kind.moves else "has no model"
            raise ConfigError(
                f"the reference {settings.reference.name!r} {why} and cannot answer here. Write: --model policy"
            )
        DPOPlugin.active().settings = settings
        plugin_set_cfg(cfg)
        second = None
        if not cfg.adapter:
            second = None if set(models) == {"policy"} else setup_reference_model(cfg, load_tokenizer(cfg), None)
            cfg.base_model = cfg.base_model_config = str(policy or cfg.base_model)
        base, _, peft_config, _ = setup_model_and_tokenizer(cfg)
        model = attach_adapters(settings, base, peft_config, int(cfg.seed or 42))
        device = next(base.parameters()).device
        dtype = torch.bfloat16 if cfg.bf16 else torch.float16 if cfg.fp16 else None
        autocast: Any = nullcontext() if dtype is None else torch.autocast(device.type, dtype)
        for one in filter(None, (model, second)):
            one.eval()
        return cls(model, second, settings, autocast)

    def named(self, model: str) -> AbstractContextManager[Any]:
        """Context that gives the model of that name."""
        if model == "policy":
            return nullcontext(self.policy)
        if model == "reference":
            strategy = self.settings.reference.strategy(self.policy, self.second, self.settings.config.reference)
            return strategy.active(self.policy)
        if isinstance(self.policy, PolicyReferenceModel):
            return BaseReference(self.policy).active(self.policy)
        return nullcontext(self.second)

    def answers(
        self, model: str, ids: Sequence[Sequence[int]], stop_ids: tuple[int, ...], tokenizer: Any, seed: int
    ) -> list[list[ScoredAnswer]]:
        """Let a model answer prompts, ``pairs.answers`` times each; without scores yet."""
        options = self.settings.config.pairs
        count = options.answers
        how = AnswerOptions(
            max_new_tokens=options.max_new_tokens,
            stop_ids=stop_ids,
            pad_token_id=tokenizer.pad_token_id,
            temperature=options.temperature,
            seed=seed,
            top_p=options.top_p,
            at_once=options.batch_size,
        )
        with self.autocast, self.named(model) as named:
            found = generate(generator_of(named), [prompt for prompt in ids for _ in range(count)], how)
        texts = tokenizer.batch_decode(found, skip_special_tokens=True)
        answers = [
            ScoredAnswer(text.strip(), 0.0, model, bool(tokens) and tokens[-1] in stop_ids)
            for text, tokens in zip(texts, found, strict=True)
        ]
        return [answers[start : start + count] for start in range(0, len(answers), count)]


def tokenized(
    prompts: Sequence[Prompt], cfg: Any, settings: RunSettings, tokenizer: Any
) -> tuple[list[list[int]], tuple[int, ...]]:
    """Tokenise prompts as the training data's are.

    Returns:
        Token ids of the prompts, and the ids that end an answer.

    Raises:
        ConfigError: If the template refuses a prompt, or the model's context does not hold it and an answer.
    """
    entry, longest = settings.datasets[0], settings.config.pairs.max_new_tokens
    renderer = renderer_of(settings.template, entry, tokenizer, True)
    plain = entry.get("type") == "dpo_plugin.text"
    ids = [render_prompt(prompt, renderer, plain, f"prompt {n}") for n, prompt in enumerate(prompts, start=1)]
    config = AutoConfig.from_pretrained(cfg.base_model, revision=settings.revision)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    for number, prompt in enumerate(ids, start=1):
        if context is not None and len(prompt) + longest > context:
            raise ConfigError(
                f"prompt {number} has {len(prompt)} tokens; with an answer of `pairs.max_new_tokens: {longest}` it is "
                f"beyond the model's context of {context}. Write: a shorter prompt, or max_new_tokens: "
                f"{max(1, context - len(prompt))}"
            )
    own = getattr(config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *renderer.end_of_turn_ids[-1:], *(own if isinstance(own, list) else [own])}
    return ids, tuple(sorted(ends - {None}))
