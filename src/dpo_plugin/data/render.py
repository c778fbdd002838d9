"""From messages to text and token ids by the tokenizer's own chat template, without searching for the answer in it.

Stock axolotl cuts the completion out with ``str.find(content)``, which finds a short answer inside the system
prompt or a special token (axolotl 0.19 and 0.20, prompt_strategies/dpo/chat_template.py:109,230). Here the prompt is
rendered with its generation prompt, the conversation is rendered whole, and the completion is the difference.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from os.path import commonprefix
from threading import current_thread, main_thread
from typing import Any

from dpo_plugin.data.audit import EMPTY
from dpo_plugin.data.refusals import answered, refuse_half_characters, refuse_loss, refuse_special_tokens, said_before
from dpo_plugin.errors import RowError, TemplateError
from dpo_plugin.types import Message, PreferencePair, RenderedPair

# Letters only, so that no template strips, escapes or splits them.
_QUESTION, _ANSWER = "dpoPluginQuestion", "dpoPluginAnswer"

LONGEST_RENDERING = 10.0
"""Seconds that a chat template may take for one conversation; templates take less than a thousandth of it."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in code that takes longer; in another thread than the main one nothing interrupts it."""
    if current_thread() is not main_thread():
        yield
        return

    def expired(*_: Any) -> None:
        raise TimeoutError(f"it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True, slots=True)
class PairIds:
    """Token ids of a pair: ``prompt + chosen`` and ``prompt + rejected`` are the ids of the whole texts."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(eq=False)
class Renderer:
    """Renders pairs with one tokenizer and its chat template.

    Attributes:
        tokenizer: A fast tokenizer.
        template: The Jinja chat template; the tokenizer's own unless another is given.
        name: What to call the template in messages.
        template_kwargs: Arguments of the chat template for every row; a row's own come on top.
        refuse_special_tokens: Refuse a row whose messages contain the text of a special token, which the tokenizer
            would turn into that token.
    """

    tokenizer: Any
    template: str | None = None
    name: str = "the tokenizer's chat template"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    refuse_special_tokens: bool = True

    def __post_init__(self) -> None:
        self.template = self.template or self.tokenizer.chat_template

    def text(self, messages: Sequence[Message], pair: PreferencePair, generate: bool) -> str:
        """The template applied to messages, with or without its generation prompt.

        Raises:
            RowError: If the template refuses the conversation (e.g. roles that do not alternate), or does not end.
        """
        try:
            with _time_limit(LONGEST_RENDERING):
                rendered: str = self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=pair.tools,
                    chat_template=self.template,
                    add_generation_prompt=generate,
                    tokenize=False,
                    **{**self.template_kwargs, **pair.template_kwargs},
                )
        except Exception as error:  # Jinja raises whatever the template's author chose
            raise RowError(f"{self.name} refuses the conversation: {error}") from error
        return rendered

    def render(self, pair: PreferencePair | RenderedPair) -> RenderedPair:
        """Prompt and completions as text; ``prompt + completion`` is the template's text up to its end of turn.

        Raises:
            RowError: If this conversation cannot be split, contains a special token, or does not come out whole.
            TemplateError: If the template can split no conversation at all.
        """
        rendered = self._finish_text(pair) if isinstance(pair, RenderedPair) else self._render_messages(pair)
        refuse_half_characters(rendered)
        return rendered

    def _render_messages(self, pair: PreferencePair) -> RenderedPair:
        if self.refuse_special_tokens:
            refuse_special_tokens(pair, self._control_token)
        end = self.end_of_turn
        prompt = self.text(pair.prompt, pair, generate=True)
        refuse_loss(prompt, said_before(pair.prompt, pair.tools), self.name)
        chosen = self._completion(prompt, pair, pair.chosen, end)
        return RenderedPair(prompt, chosen, self._completion(prompt, pair, pair.rejected, end), pair.source)

    def _completion(self, prompt: str, pair: PreferencePair, answer: Sequence[Message], end_of_turn: str) -> str:
        whole = self.text([*pair.prompt, *answer], pair, generate=False)
        if not whole.startswith(prompt):
            raise RowError(
                f"{self.name} renders the prompt differently once an answer follows: {_parting(prompt, whole)}"
            )
        completion = whole[len(prompt) :]
        end = completion.rfind(end_of_turn)
        if end < 0:
            raise RowError(f"{self.name} writes no end of turn {end_of_turn!r} after the answer")
        if not completion[:end].strip():
            raise RowError("the completion is empty", EMPTY)
        refuse_loss(completion[:end], answered(answer), self.name)
        return completion[: end + len(end_of_turn)]

    def _finish_text(self, pair: RenderedPair) -> RenderedPair:
        prompt, (chosen, rejected) = pair.prompt, (self._ended(pair.chosen), self._ended(pair.rejected))
        bos = self.tokenizer.bos_token
        if bos and self._adds_bos and not prompt.startswith(bos):
            prompt = bos + prompt
        return RenderedPair(prompt, chosen, rejected, pair.source)

    def _ended(self, text: str) -> str:
        bare = text.rstrip()
        return bare if any(bare.endswith(token) for token in self._control_tokens) else text + self.tokenizer.eos_token

    @cached_property
    def _adds_bos(self) -> bool:
        return bool(self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id])

    @cached_property
    def _control_token(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._control_tokens)) or "(?!)")

    @cached_property
    def _control_tokens(self) -> list[str]:
        """Texts that the tokenizer turns into control tokens, each before what it begins with."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        return sorted(special, reverse=True)

    @cached_property
    def end_of_turn(self) -> str:
        """What the template writes right after an answer to end it, e.g. ``<|im_end|>``; one or more special tokens.

        Raises:
            TemplateError: If the template cannot render one question and one answer, does not continue its own
                generation prompt, or ends an answer with no special token.
        """
        if not self.template:
            raise TemplateError(
                "the tokenizer has no chat template. Write, for a model that has none of its own: chat_template: chatml"
            )
        ask, answer = Message(role="user", content=_QUESTION), Message(role="assistant", content=_ANSWER)
        probe = PreferencePair([ask], [answer], [])
        try:
            prompt, whole = self.text([ask], probe, generate=True), self.text([ask, answer], probe, generate=False)
        except RowError as error:
            raise TemplateError(f"{error}, which is one question and one answer") from error
        if not whole.startswith(prompt):
            raise TemplateError(
                f"{self.name} does not continue its own generation prompt: {_parting(prompt, whole)}. Write another "
                "`chat_template`, or, for a template with thinking, try: chat_template_kwargs: {enable_thinking: true}"
            )
        end = self._stop_run(prompt, whole)
        if not end:
            after = whole.rpartition(_ANSWER)[2]
            raise TemplateError(
                f"{self.name} ends an answer with {after[:40]!r}, which is no special token of the tokenizer, so the "
                "model could not learn to stop. Write: chat_template: <one that fits the base model>"
            )
        return end

    @cached_property
    def end_of_turn_ids(self) -> list[int]:
        """Token ids of `end_of_turn`; empty without a chat template."""
        return self._ids([self.end_of_turn])[0] if self.template else []

    def _stop_run(self, prompt: str, whole: str) -> str:
        """The special tokens after the answer, up to and with the first that also ends a user's turn or the text."""
        rest = whole.rpartition(_ANSWER)[2].lstrip()
        stops = {self.tokenizer.eos_token, self._leading_token(prompt.rpartition(_QUESTION)[2].lstrip())}
        run: list[str] = []
        while token := self._leading_token(rest):
            run.append(token)
            if token in stops:
                return "".join(run)
            rest = rest[len(token) :]
        return run[0] if run else ""

    def _leading_token(self, text: str) -> str:
        return next((token for token in self._all_tokens if text.startswith(token)), "")

    @cached_property
    def _all_tokens(self) -> list[str]:
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        return sorted(added | set(self._control_tokens), reverse=True)

    @cached_property
    def unknown_id(self) -> int | None:
        """Id for what is not in the vocabulary; None if there is none, or if it begins or ends texts too (GPT-2)."""
        unknown: int | None = self.tokenizer.unk_token_id
        return None if unknown in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) else unknown

    @cached_property
    def longest_token(self) -> int:
        """Length of the vocabulary's longest token, in the characters that the vocabulary is written in."""
        return max(map(len, self.tokenizer.get_vocab()))

    def tokenize(self, pairs: Sequence[RenderedPair]) -> list[PairIds]:
        """Token ids of rendered pairs, in one batch.

        A tokenizer splits a text at its special tokens before anything else, so the text before the prompt's last
        special token is tokenised once, and only what follows it is tokenised with each completion. Where that does
        not give the ids of the whole text, as the first pairs of a batch show, whole texts are tokenised.

        A token that spans the end of the prompt (a line break that merges with the answer's first) belongs to the
        completions: the prompt's ids are what prompt, prompt + chosen and prompt + rejected begin with in common.
        """
        probes = pairs[:8]
        if self._tokenize_parts(probes) != self._tokenize_whole(probes):
            return self._tokenize_whole(pairs)
        return self._tokenize_parts(pairs)

    def _tokenize_whole(self, pairs: Sequence[RenderedPair]) -> list[PairIds]:
        texts = [(pair.prompt, pair.prompt + pair.chosen, pair.prompt + pair.rejected) for pair in pairs]
        ids = self._ids(list(chain.from_iterable(texts)))
        return [split_ids(*ids[start : start + 3]) for start in range(0, len(ids), 3)]

    def _tokenize_parts(self, pairs: Sequence[RenderedPair]) -> list[PairIds]:
        cuts = [max([0, *map(pair.prompt.rfind, self._control_tokens)]) for pair in pairs]
        heads = self._ids([pair.prompt[:cut] for pair, cut in zip(pairs, cuts, strict=True)])
        tails = [replace(pair, prompt=pair.prompt[cut:]) for pair, cut in zip(pairs, cuts, strict=True)]
        parts = zip(heads, self._tokenize_whole(tails), strict=True)
        return [PairIds(head + tail.prompt, tail.chosen, tail.rejected) for head, tail in parts]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts; straight from the Rust tokenizer where there is one, which spares offsets and masks."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not texts:
            return []
        if backend is None:
            return list(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        backend.no_truncation()
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def split_ids(prompt: list[int], with_chosen: list[int], with_rejected: list[int]) -> PairIds:
    """Split the ids of two whole texts where they leave the prompt's own ids."""
    boundary = len(prompt)
    while with_chosen[:boundary] != prompt[:boundary] or with_rejected[:boundary] != prompt[:boundary]:
        boundary -= 1
    return PairIds(prompt[:boundary], with_chosen[boundary:], with_rejected[boundary:])


def _parting(prompt: str, whole: str) -> str:
    """Where two texts part, for messages."""
    same = len(commonprefix([prompt, whole]))
    before, ours, theirs = prompt[max(0, same - 20) : same], prompt[same : same + 30], whole[same : same + 30]
    return f"after {before!r} it writes {ours!r}, then {theirs!r}"
