"""Invariant 4 on every chat template that axolotl ships, on random conversations."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_plugin.data.formats import FORMATS, Columns, conversations
from dpo_plugin.data.render import Renderer
from dpo_plugin.errors import RowError, TemplateError
from tests.support import templates

NAMES = [name for name in templates.names() if name not in templates.CANNOT]
CASES = 100  # per template; 33 templates make 3,300

WORDS = ["user", "assistant", "a", "A", "system", "model", "You", "<|im", "Answer", "\n", "\n\n", " ", "🙂", "שלום", "مرحبا", "\u200f", "é", "e\u0301", "0", "...", "</think>", "[INST]", "{{ x }}", "{% raw %}"]  # fmt: skip
text = st.one_of(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map("".join),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=30),
    st.tuples(
        st.sampled_from(["", " ", "\n", "\t"]), st.text("ab cd.\n", max_size=12), st.sampled_from(["", " ", "\n"])
    ).map("".join),
)


@st.composite
def rows(draw):
    history = []
    if draw(st.integers(0, 3)) == 3:
        history.append({"role": "system", "content": draw(st.one_of(st.just(""), text))})
    for _ in range(draw(st.integers(0, 2))):
        history += [{"role": "user", "content": draw(text)}, {"role": "assistant", "content": draw(text)}]
    history.append({"role": "user", "content": draw(text)})
    if draw(st.integers(0, 7)) == 7:
        history[-1]["content"] += draw(st.sampled_from(["<|im_end|>", "<s>Hi", "a<|im_start|>", "</s>"]))
    said = draw(st.lists(text.filter(str.strip), min_size=2, max_size=2, unique=True))
    answers = [{"role": "assistant", "content": words} for words in said]
    return {"chosen": [*history, answers[0]], "rejected": [*history, answers[1]]}


refused: Counter[str] = Counter()
held: Counter[str] = Counter()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(row=rows())
def test_prompt_and_completion_are_the_template_of_the_whole_conversation(name, row):
    tokenizer = templates.tokenizer(name)
    renderer = Renderer(tokenizer, name=name)
    try:
        pair = conversations(row, Columns())
        rendered = renderer.render(pair)
    except RowError:
        refused[name] += 1
        return
    held[name] += 1
    ids = renderer.tokenize([rendered])[0]
    assert rendered.prompt == tokenizer.apply_chat_template(
        list(pair.prompt), add_generation_prompt=True, tokenize=False
    )
    for completion, answer, answer_ids in (
        (rendered.chosen, pair.chosen, ids.chosen),
        (rendered.rejected, pair.rejected, ids.rejected),
    ):
        whole = tokenizer.apply_chat_template([*pair.prompt, *answer], tokenize=False)
        assert whole.startswith(rendered.prompt + completion)
        left = whole.removeprefix(rendered.prompt + completion)
        said = answer[-1]["content"].strip()
        assert said in completion or "</think>" in said  # nothing is lost, but where the template reads thinking markup
        assert not left.strip() or left.strip() in TAILS.get(name, ()), left
        assert completion.endswith(renderer.end_of_turn)
        assert ids.prompt + answer_ids == tokenizer(rendered.prompt + completion, add_special_tokens=False)["input_ids"]
        assert answer_ids[-len(renderer.end_of_turn_ids) :] == renderer.end_of_turn_ids
        assert len(answer_ids) > len(renderer.end_of_turn_ids)
    assert (ids.prompt + ids.chosen).count(tokenizer.bos_token_id) <= 1


# What these templates write after the end of the last turn, which is not for the model to learn.
TAILS = dict.fromkeys(
    ("command_a", "command_a_rag", "command_a_tool_use"), ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",)
)


def test_two_thousand_cases_were_tried_and_every_template_held_on_many():
    """Runs after the cases above; a template whose every conversation were refused would hold nothing."""
    if not held:
        pytest.skip("needs the property test in the same run")
    assert sum(held.values()) >= 2000, (held, refused)
    assert not [name for name in NAMES if held[name] < 10], held


@pytest.mark.parametrize("name", sorted(templates.CANNOT))
def test_a_template_that_cannot_is_an_error_that_names_it(name):
    ask = {"role": "user", "content": "Hi"}
    pair = conversations(
        {
            "chosen": [ask, {"role": "assistant", "content": "a"}],
            "rejected": [ask, {"role": "assistant", "content": "b"}],
        },
        Columns(),
    )
    with pytest.raises(TemplateError, match=f"^{name} "):
        Renderer(templates.tokenizer(name), name=name).render(pair)


@pytest.mark.parametrize("name", ["qwen_25", "llama3"])
@pytest.mark.parametrize("answer", ["a", "A", "user", "You", " Paris is the capital.", "Paris.\n"])
def test_answers_that_stock_cuts_wrong_come_out_whole(name, answer):
    ask = {"role": "user", "content": "What is the capital of France?"}
    row = {
        "chosen": [ask, {"role": "assistant", "content": answer}],
        "rejected": [ask, {"role": "assistant", "content": "no idea"}],
    }
    renderer = Renderer(templates.tokenizer(name), name=name)
    rendered = renderer.render(conversations(row, Columns()))
    expected = answer.strip() if name == "llama3" else answer  # llama3's template trims
    assert rendered.chosen == expected + renderer.end_of_turn


class TestArgumentsReachTheTemplate:
    ASK: ClassVar = {"role": "user", "content": "1 + 1?"}

    def render(self, name, chosen, template_kwargs=None, **row):
        row = {"prompt": [self.ASK], "chosen": chosen, "rejected": "no idea", **row}
        renderer = Renderer(templates.tokenizer(name), name=name, template_kwargs=template_kwargs or {})
        return renderer.render(FORMATS["chat"](row, Columns()))

    def test_tools_and_tool_calls(self):
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}
        chosen = [{"role": "assistant", "content": "", "tool_calls": [call]}]
        tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
        rendered = self.render("qwen_25", chosen, tools=tools)
        assert "<tools>" in rendered.prompt
        assert '"name": "add"' in rendered.chosen
        assert rendered.chosen.endswith("</tool_call><|im_end|>")

    @pytest.mark.parametrize("where", ["config", "row"])
    def test_enable_thinking(self, where):
        off = {"enable_thinking": False}
        rendered = (
            self.render("qwen3", "2", off) if where == "config" else self.render("qwen3", "2", chat_template_kwargs=off)
        )
        assert rendered.prompt.endswith("<think>\n\n</think>\n\n")
        assert rendered.chosen == "2<|im_end|>"

    def test_reasoning_content(self):
        chosen = [{"role": "assistant", "content": "2", "reasoning_content": "One and one."}]
        rejected = [{"role": "assistant", "content": "3", "reasoning_content": "A guess."}]
        rendered = self.render("exaone4", chosen, {"enable_thinking": True, "skip_think": False}, rejected=rejected)
        assert rendered.prompt.endswith("<think>\n")
        assert rendered.chosen.startswith("One and one.\n</think>\n\n2")
