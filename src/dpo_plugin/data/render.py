"""From messages to text and token ids by the tokenizer's own chat template, without searching for the answer in it.

Stock axolotl cuts the completion out with ``str.find(content)``, which finds a short answer inside the system
prompt or a special token (axolotl 0.19, prompt_strategies/dpo/chat_template.py:109,230). Here the prompt is
rendered with its generation prompt, the conversation is rendered whole, and the completion is the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dpo_plugin.errors import RowError, TemplateError
from dpo_plugin.types import Message, PreferencePair, RenderedPair

# Letters only, so that no template strips, escapes or splits it.
_PROBE = "dpoPluginProbe"


@dataclass(frozen=True)
class PairIds:
    """Token ids of a pair: ``prompt + chosen`` are the ids of the whole text."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Renderer:
    """Renders pairs with one tokenizer and its chat template.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        template: A Jinja chat template that replaces the tokenizer's own.
        name: What to call the template in messages.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, name: str = "the tokenizer's chat template"):
        self.tokenizer = tokenizer
        self.template = template
        self.name = name
        if not (template or tokenizer.chat_template):
            raise TemplateError(
                "the tokenizer has no chat template. Write, for a Qwen2.5 model: chat_template: qwen_25"
            )

    def text(self, messages: Sequence[Message], pair: PreferencePair, generate: bool) -> str:
        """The template applied to messages, with or without its generation prompt.

        Raises:
            RowError: If the template refuses the conversation (e.g. roles that do not alternate).
        """
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                list(messages),
                tools=pair.tools,
                chat_template=self.template,
                add_generation_prompt=generate,
                tokenize=False,
                **pair.template_kwargs,
            )
        except Exception as error:  # Jinja raises whatever the template's author chose
            raise RowError(f"{self.name} refuses the conversation: {error}") from error
        return rendered

    def render(self, pair: PreferencePair) -> RenderedPair:
        """Prompt and completions as text; ``prompt + completion`` is the template's text up to its end of turn.

        Raises:
            RowError: If this conversation cannot be split or a completion is empty.
            TemplateError: If the template can split no conversation.
        """
        prompt = self.text(pair.prompt, pair, generate=True)
        return RenderedPair(
            prompt, self._completion(prompt, pair, pair.chosen), self._completion(prompt, pair, pair.rejected)
        )

    def _completion(self, prompt: str, pair: PreferencePair, answer: Sequence[Message]) -> str:
        whole = self.text([*pair.prompt, *answer], pair, generate=False)
        if not whole.startswith(prompt):
            raise RowError(f"{self.name} renders the prompt differently once an answer follows")
        completion = whole[len(prompt) :]
        end = completion.rfind(self.end_of_turn)
        if end < 0:
            raise RowError(f"{self.name} writes no end of turn {self.end_of_turn!r} after the answer")
        if end == 0:
            raise RowError("the completion is empty")
        return completion[: end + len(self.end_of_turn)]

    @cached_property
    def end_of_turn(self) -> str:
        """The special tokens that the template writes right after an answer, e.g. ``<|im_end|>``.

        Raises:
            TemplateError: If no special token follows an answer.
        """
        probe = PreferencePair([Message(role="user", content="Hi")], [Message(role="assistant", content=_PROBE)], [])
        try:
            whole = self.text([*probe.prompt, *probe.chosen], probe, generate=False)
        except RowError as error:
            raise TemplateError(f"{self.name} cannot render one user turn and one answer: {error}") from error
        rest = whole[whole.rfind(_PROBE) + len(_PROBE) :].lstrip()
        end = ""
        while special := next((token for token in self._special_tokens if rest.startswith(token)), None):
            end += special
            rest = rest[len(special) :]
        if not end:
            raise TemplateError(
                f"{self.name} ends an answer with {rest[:40]!r}, which is no special token of the tokenizer, so the "
                "model could not learn to stop. Write: chat_template: <one that fits the base model>"
            )
        return end

    @cached_property
    def _special_tokens(self) -> list[str]:
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        return sorted(added | set(self.tokenizer.all_special_tokens), key=len, reverse=True)

    def tokenize(self, pairs: Sequence[RenderedPair]) -> list[PairIds]:
        """Token ids of rendered pairs, each text tokenised once, in one batch.

        A token that spans the end of the prompt (a line break that merges with the answer's first) belongs to the
        completions: the prompt's ids are what prompt, prompt + chosen and prompt + rejected begin with in common.
        """
        texts = [
            text for pair in pairs for text in (pair.prompt, pair.prompt + pair.chosen, pair.prompt + pair.rejected)
        ]
        ids = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []
        return [split_ids(*ids[start : start + 3]) for start in range(0, len(ids), 3)]


def split_ids(prompt: list[int], with_chosen: list[int], with_rejected: list[int]) -> PairIds:
    """Split the ids of two whole texts where they leave the prompt's own ids."""
    boundary = len(prompt)
    while with_chosen[:boundary] != prompt[:boundary] or with_rejected[:boundary] != prompt[:boundary]:
        boundary -= 1
    return PairIds(prompt[:boundary], with_chosen[boundary:], with_rejected[boundary:])
