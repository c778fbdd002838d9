"""Formats and rendering of single rows."""

import copy

import pytest

from dpo_plugin.data.formats import Columns, conversations
from dpo_plugin.data.render import Renderer, _parting, split_ids
from dpo_plugin.errors import RowError, TemplateError
from tests.support.tiny import chat_row

ANSWERS = ["a", "A", "user", "You", " Paris is the capital.", "Paris.\n", "\n\nParis", "<|im"]


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def pair_of(chosen, rejected, **row):
    return conversations({"chosen": chosen, "rejected": rejected, **row}, Columns())


def test_the_shared_history_is_the_longest_common_prefix():
    history = [{"role": "system", "content": "Be kind."}, user("Hi"), bot("Hello"), user("Tea?")]
    pair = pair_of([*history, bot("Yes, please.")], [*history, bot("No.")], source="made")
    assert list(pair.prompt) == history
    assert list(pair.chosen) == [bot("Yes, please.")]
    assert list(pair.rejected) == [bot("No.")]
    assert pair.source == "made"


def test_conversations_that_part_earlier_keep_their_own_turns():
    pair = pair_of([user("Hi"), bot("A"), user("x"), bot("B")], [user("Hi"), bot("C"), user("x"), bot("D")])
    assert list(pair.prompt) == [user("Hi")]
    assert [m["content"] for m in pair.chosen] == ["A", "x", "B"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([user("a"), bot("b")], [user("a"), bot("b")], "equal"),
        ([user("a"), bot("b")], [user("c"), bot("d")], "no user turn"),
        ([user("a"), bot("b"), user("c")], [user("a"), bot("d")], "ends with the user"),
        ([user("a"), {"role": "wizard", "content": "b"}], [user("a"), bot("d")], "unknown role 'wizard'"),
        ([user("a"), {"role": "assistant", "content": None}], [user("a"), bot("d")], "content is missing, not text"),
        (None, [user("a"), bot("d")], "`chosen` is missing"),
        ("text", [user("a"), bot("d")], "`chosen` is str, not a list"),
        (["text"], [user("a"), bot("d")], "holds str"),
    ],
)
def test_a_row_that_cannot_be_read_says_why(chosen, rejected, reason):
    with pytest.raises(RowError, match=reason):
        pair_of(chosen, rejected)


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_comes_out_whole(tokenizer, answer):
    renderer = Renderer(tokenizer)
    pair = conversations(chat_row("What is it?", answer, "something else"), Columns())
    rendered = renderer.render(pair)
    assert rendered.chosen == f"{answer}<|im_end|>"
    whole = tokenizer.apply_chat_template([*pair.prompt, *pair.chosen], tokenize=False)
    assert (rendered.prompt + rendered.chosen) == whole.rstrip("\n")
    ids = renderer.tokenize([rendered])[0]
    assert ids.prompt + ids.chosen == tokenizer(whole.rstrip("\n"), add_special_tokens=False)["input_ids"]
    assert ids.chosen[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids.prompt + ids.chosen) == rendered.prompt + rendered.chosen


def test_a_token_across_the_boundary_belongs_to_the_completions():
    ids = split_ids([1, 2, 3], [1, 2, 9, 4], [1, 2, 3, 5])
    assert (ids.prompt, ids.chosen, ids.rejected) == ([1, 2], [9, 4], [3, 5])


def test_a_template_without_an_end_of_turn_is_an_error_that_names_it(tokenizer):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(TemplateError, match="^plain ends an answer with"):
        Renderer(tokenizer, template, "plain").render(conversations(chat_row("q", "a", "b"), Columns()))


def test_a_template_that_does_not_continue_its_generation_prompt_is_an_error_that_names_it(tokenizer):
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>hm{% endif %}"
    with pytest.raises(TemplateError, match="^odd does not continue its own generation prompt"):
        Renderer(tokenizer, template, "odd").render(conversations(chat_row("q", "a", "b"), Columns()))


@pytest.mark.parametrize(
    ("prompt", "whole", "says"),
    [
        ("You say:", "They say:", "after '' it writes 'You say:', then 'They say:'"),
        (
            f"{'a' * 7}{'b' * 20}{'c' * 30}!",
            f"{'a' * 7}{'b' * 20}{'d' * 30}!",
            f"after '{'b' * 20}' it writes '{'c' * 30}', then '{'d' * 30}'",
        ),
        ("Q: ", "Q: Yes", "after 'Q: ' it writes '', then 'Yes'"),
    ],
)
def test_a_message_shows_where_two_texts_part(prompt, whole, says):
    assert _parting(prompt, whole) == says


def test_a_tokenizer_without_template_is_an_error(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(TemplateError, match="chat_template: chatml"):
        Renderer(bare).render(conversations(chat_row("q", "a", "b"), Columns()))
