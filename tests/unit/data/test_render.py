"""Where a rendered text is cut, with templates and special tokens that are made for one question each."""

# 24 mutants of render.py (mutmut) survive, since they change nothing: nine are `strict=` of a `zip` of equal lengths; four
# take the tokenizer's own call, which gives the same ids more slowly; three give None for a `False` that is asked only
# whether it is true, and one for an empty text; three change messages of a probe that nothing reads; two change how text is
# cut into the pieces that are tokenised, or how many of them are first compared with whole texts; one writes another pattern
# that matches nothing; and one looks for the BOS before another text.

import copy
import signal
import threading

import pytest
from tokenizers import AddedToken, processors

from dpo_plugin.data import render
from dpo_plugin.data.audit import EMPTY
from dpo_plugin.data.render import Renderer
from dpo_plugin.errors import RowError, TemplateError
from dpo_plugin.types import PreferencePair, RenderedPair

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}
TURNS = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + TAIL }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
END = "<|im_end|>"


def pair(answer="Yes.", other="No.", prompt=(USER,)):
    return PreferencePair(list(prompt), [{**BOT, "content": answer}], [{**BOT, "content": other}])


def renderer(tokenizer, tail, tokens=(), **settings):
    """A renderer whose turns end with ``tail``, with further special tokens."""
    made = copy.deepcopy(tokenizer)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return Renderer(made, TURNS.replace("TAIL", repr(tail)), "this template", **settings)


# ── how long a template may take ──


def test_no_alarm_is_left_behind(tokenizer):
    before = signal.getsignal(signal.SIGALRM)
    Renderer(tokenizer).render(pair())
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_template_that_does_not_end_is_said_to_take_too_long(tokenizer, monkeypatch):
    monkeypatch.setattr(render, "LONGEST_RENDERING", 0.05)
    endless = Renderer(
        tokenizer, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "this"
    )
    with pytest.raises(RowError, match=r"^this refuses the conversation: it took longer than 0\.05 s$"):
        endless.text([USER], pair(), generate=True)


def test_another_thread_renders_without_an_alarm(tokenizer):
    found = []
    thread = threading.Thread(target=lambda: found.append(Renderer(tokenizer).render(pair())))
    thread.start()
    thread.join()
    assert found == [Renderer(tokenizer).render(pair())]


# ── where an answer ends ──


def test_an_answer_that_holds_the_end_of_turn_is_cut_at_the_last(tokenizer):
    """Only where `refuse_special_tokens` is off; otherwise such a row is refused."""
    found = renderer(tokenizer, END, refuse_special_tokens=False).render(pair(f"Yes.{END}Or no."))
    assert (found.chosen, found.rejected) == (f"Yes.{END}Or no.{END}", f"No.{END}")


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_is_refused_under_its_own_reason(tokenizer, answer):
    with pytest.raises(RowError, match="^the completion is empty$") as refused:
        renderer(tokenizer, END).render(pair(answer))
    assert refused.value.reason == EMPTY


def test_an_answer_without_an_end_of_turn_is_refused(tokenizer):
    template = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + ('' if m.content == 'Yes.' else '<|im_end|>') }}{% endfor %}"
    with pytest.raises(RowError, match=r"^this writes no end of turn '<\|im_end\|>' after the answer$"):
        Renderer(tokenizer, template, "this").render(pair())


def test_a_prompt_that_an_answer_changes_is_shown(tokenizer):
    """Only in conversations of three messages, so that one question and one answer do not show it."""
    template = TURNS.replace("TAIL", repr(END)).replace(
        "{% for m", "{{ messages | length if messages | length > 2 else 0 }}{% for m"
    )
    with pytest.raises(
        RowError, match=r"^this renders the prompt differently once an answer follows: after '' it writes '3"
    ):
        Renderer(tokenizer, template, "this").render(pair(prompt=(USER, BOT, USER)))


@pytest.mark.parametrize(
    ("tail", "tokens", "end"),
    [
        (f"\n{END}\n", (), END),  # a line break before it
        ("<e>!", ("<e>", "<e>!"), "<e>!"),  # of two tokens that fit, the longer
        ("<e><f>", ("<e>", "<f>"), "<e>"),  # none of them ends the text or the user's turn: the first
    ],
)
def test_what_ends_a_turn(tokenizer, tail, tokens, end):
    found = renderer(tokenizer, tail, tokens)
    assert found.end_of_turn == end
    assert found.end_of_turn_ids == found.tokenizer(end, add_special_tokens=False)["input_ids"]


def answers_end(tokenizer, user_tail, bot_tail, head=""):
    """End of turn where user and assistant turns end differently."""
    made = copy.deepcopy(tokenizer)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in ("<a>", "<b>", "<c>")])
    tails = f"({user_tail!r} if m.role == 'user' else {bot_tail!r})"
    return Renderer(made, head + TURNS.replace("TAIL", tails)).end_of_turn


def test_what_ends_the_users_turn_ends_the_answer_too(tokenizer):
    assert answers_end(tokenizer, "<b>", "<a><b><c>") == "<a><b>"
    assert answers_end(tokenizer, "\n<b>\n", "<a><b><c>") == "<a><b>"
    assert answers_end(tokenizer, "<b>", f"<a>{END}<b>") == f"<a>{END}", "the tokenizer's own is met first"
    assert answers_end(tokenizer, "", "<a><b><c>") == "<a>"


def test_a_template_that_repeats_what_was_said_is_read_from_its_last_turn(tokenizer):
    """As one that begins with a title made of the messages."""
    title = "{% for m in messages if m.role == ROLE %}{{ m.content }}<c>{% endfor %}"
    assert answers_end(tokenizer, "<b>", "<a><b>", title.replace("ROLE", "'user'")) == "<a><b>"
    recalled = TURNS.replace("TAIL", repr(END)).replace(
        "{% if", "{{ '' if add_generation_prompt else messages[-1].content + 'x' }}{% if"
    )
    with pytest.raises(TemplateError, match="^this ends an answer with 'x', which is no special token"):
        _ = Renderer(tokenizer, recalled, "this").end_of_turn


def test_an_added_token_that_is_not_special_can_end_a_turn_and_is_no_control_token(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.add_tokens([AddedToken("<plain>", special=False, normalized=False)])
    found = Renderer(made, TURNS.replace("TAIL", repr("<plain>")))
    assert found.end_of_turn == "<plain>"
    assert found.render(pair("<plain> words")).chosen == "<plain> words<plain>"


def test_special_tokens_are_refused_whether_or_not_they_have_a_name_and_the_longest_is_named(tokenizer):
    """An added token that is special, though not one of `additional_special_tokens`, and the longer of two that fit."""
    found = renderer(tokenizer, END, ("<e>", "<e>!"))
    with pytest.raises(RowError, match="<e>!"):
        found.render(pair("Yes <e>!"))
    with pytest.raises(RowError, match="im_start"):
        found.render(pair("Yes <|im_start|>"))


def test_without_a_template_there_is_no_end_of_turn_and_no_id_of_it(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = None
    assert Renderer(made).end_of_turn_ids == []
    with pytest.raises(TemplateError) as refused:
        _ = Renderer(made).end_of_turn
    assert str(refused.value) == (
        "the tokenizer has no chat template. Write, for a model that has none of its own: chat_template: chatml"
    )


def test_a_template_that_cannot_be_used_says_why_and_what_to_write(tokenizer):
    def message(template):
        with pytest.raises(TemplateError) as refused:
            _ = Renderer(tokenizer, template, "this").end_of_turn
        return str(refused.value)

    assert message("{{ raise_exception('no') }}") == (
        "this refuses the conversation: no, which is one question and one answer"
    )
    assert message(TURNS.replace("TAIL", repr("." * 50))) == (
        f"this ends an answer with {'.' * 40!r}, which is no special token of the tokenizer, so the "
        "model could not learn to stop. Write: chat_template: <one that fits the base model>"
    )
    assert message("{{ 'a' if add_generation_prompt else 'b' }}") == (
        "this does not continue its own generation prompt: after '' it writes 'a', then 'b'. Write another "
        "`chat_template`, or, for a template with thinking, try: chat_template_kwargs: {enable_thinking: true}"
    )


# ── ids ──


@pytest.mark.parametrize("with_eos", [False, True])
def test_rendered_text_begins_with_the_bos_that_the_tokenizer_would_add(tokenizer, with_eos):
    """Some tokenizers put an EOS behind every text as well."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"bos_token": "<s>"})
    shape = f"<s> $A {END}" if with_eos else "<s> $A"
    ids = [(token, made.convert_tokens_to_ids(token)) for token in ("<s>", END)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=shape, special_tokens=ids)
    assert Renderer(made).render(RenderedPair("Hi", "a", "b")) == RenderedPair("<s>Hi", f"a{END}", f"b{END}")


class WithoutBackend:
    """A tokenizer that is not one of the Rust library, as mistral-common's."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, *args, **settings):
        return self._tokenizer(*args, **settings)

    def __getattr__(self, name):
        if name == "backend_tokenizer":
            raise AttributeError(name)
        return getattr(self._tokenizer, name)


def test_a_tokenizer_without_a_rust_backend_gives_the_same_ids(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"bos_token": "<s>"})
    ids = [("<s>", made.convert_tokens_to_ids("<s>"))]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    rendered = [Renderer(made).render(pair(answer)) for answer in ("Yes.", "Perhaps.")]
    assert Renderer(WithoutBackend(made)).tokenize(rendered) == Renderer(made).tokenize(rendered)
    assert Renderer(WithoutBackend(made)).tokenize([]) == []
