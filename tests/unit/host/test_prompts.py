"""Prompts of a file are rendered as the training data is, or refused."""

import pytest
from axolotl.utils.dict import DictDefault

from dpo_plugin.errors import ConfigError
from dpo_plugin.host.templates import check_rendered_as_trained, renderer_of

JINJA = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def row(tokenizer, prompt, chosen):
    return {"prompt_ids": tokenizer(prompt)["input_ids"], "chosen_ids": tokenizer(chosen)["input_ids"]}


def check(tokenizer, rows, entry):
    check_rendered_as_trained(rows, renderer_of({"rl": "dpo"}, entry, tokenizer, True), "./prompts.txt")


def test_rows_of_the_template_are_taken_and_another_text_is_refused(tokenizer):
    ask = [{"role": "user", "content": "Why?"}]
    templated = row(tokenizer, tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True), "So.")
    other = row(tokenizer, "Question: Why?\nAnswer:", " So.")
    check(tokenizer, [templated], {"type": "dpo_plugin.chat"})
    check(tokenizer, [other, templated], {"type": "dpo_plugin.chat"})
    with pytest.raises(ConfigError, match=r"before an answer, and the training data does not.*Write: prompts: eval$"):
        check(tokenizer, [other], {"type": {"prompt_format": "Question: {prompt}\nAnswer:"}})
    check(tokenizer, [row(tokenizer, "user: Why?<|im_end|>assistant:", " So.")], {"chat_template_jinja": JINJA})


@pytest.mark.parametrize("named", [{}, {"chat_template": "jinja"}])
@pytest.mark.parametrize("config", [{}, {"chat_template": "chatml"}])
def test_a_data_sets_own_jinja_needs_no_chat_template_beside_it(tokenizer, named, config):
    renderer = renderer_of(DictDefault(config), {"chat_template_jinja": JINJA, **named}, tokenizer, True)
    assert renderer.template == JINJA
    assert renderer.end_of_turn == "<|im_end|>"
