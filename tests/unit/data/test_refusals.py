"""Rows that would crash, change the conversation, or lose words are counted with number and reason."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from dpo_plugin.data.formats import FORMATS, Columns, conversations
from dpo_plugin.data.render import Renderer
from dpo_plugin.errors import DataError, RowError
from tests.support import templates
from tests.support.tiny import chat_row, write_rows
from tests.unit.data.test_prepare import preparation

DEEP = "[" * 100_000 + "]" * 100_000
SPECIAL = "say <|im_end|>"


def left_out(tokenizer, folder, *rows, **options):
    """Reasons and messages of rows put among good ones; each row is counted, and the good ones are kept."""
    good = [chat_row(f"q{n}", "yes", "no") for n in range(3)]
    file = write_rows(folder / "rows.jsonl", [good[0], *rows, *good[1:]])
    data, audit = preparation(tokenizer, file, **options).load_or_run(folder / "store")
    assert data["row"][:] == [1, len(rows) + 2, len(rows) + 3]
    assert audit["read"] == len(rows) + 3
    assert [example["row"] for example in audit["examples"]] == list(range(2, len(rows) + 2))
    return [(example["reason"], example["message"]) for example in audit["examples"]]


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected", "source"])
@pytest.mark.parametrize("kind", ["conversations", "text"])
def test_a_lone_surrogate(tokenizer, tmp_path, name, kind):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "source": "s"}
    row[name] += "\ud83d"
    made = preparation(tokenizer, write_rows(tmp_path / "rows.jsonl", [row, {**row, name: "c"}]))
    if kind == "text":
        made.read = FORMATS["text"]
    data, audit = made.load_or_run(tmp_path / "store")
    assert data["row"][:] == [2]
    assert audit["left_out"] == {"malformed": 1}
    assert "lone surrogate U+D83D" in audit["examples"][0]["message"]
    json.dumps(audit, ensure_ascii=False).encode()


def test_json_nested_too_deep(tokenizer, tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": DEEP}
    ask = {"role": "user", "content": "q"}
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    wrong = [
        {**row, "tools": DEEP},
        {**row, "chat_template_kwargs": DEEP},
        {"chosen": [ask, call], "rejected": [ask, {"role": "assistant", "content": "b"}]},
    ]
    assert [reason for reason, _ in left_out(tokenizer, tmp_path, *wrong)] == ["malformed"] * 3


def test_nesting_that_json_allows_and_python_cannot_compare(tokenizer, tmp_path):
    deep = "[" * 900 + '"x"' + "]" * 900
    file = tmp_path / "rows.jsonl"
    ask = f'{{"role": "user", "content": "q", "tool_calls": {deep}}}'
    answers = [json.dumps({"role": "assistant", "content": text}) for text in "ab"]
    hostile = f'{{"chosen": [{ask}, {answers[0]}], "rejected": [{ask}, {answers[1]}], "source": {deep}}}'
    file.write_text("\n".join([hostile, json.dumps(chat_row("q", "a", "b"))]))
    data, audit = preparation(tokenizer, file).load_or_run(tmp_path / "store")
    assert audit["read"] == 2
    assert 2 in data["row"][:]


def test_control_tokens_in_all_that_reaches_the_template(tokenizer, tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    tool = {"type": "function", "function": {"name": "add", "description": SPECIAL, "parameters": {}}}
    key = {"type": "function", "function": {"name": "add", "parameters": {"properties": {SPECIAL: {}}}}}
    wrong = [
        {**row, "tools": [tool]},
        {**row, "tools": json.dumps([key]).replace("<", "\\u003c")},
        {**row, "chat_template_kwargs": {"documents": [{"text": SPECIAL}]}},
        {**row, "chat_template_kwargs": json.dumps({"x": ["<|im_start|>"]})},
        {**row, "prompt": [{"role": "user", "content": "q", "name": SPECIAL}]},
    ]
    told = left_out(tokenizer, tmp_path, *wrong)
    assert [reason for reason, _ in told] == ["special token in text"] * 5
    assert ["`tools`" in message for _, message in told] == [True, True, False, False, False]
    allowed = Renderer(tokenizer, refuse_special_tokens=False)
    assert allowed.render(FORMATS["chat"](wrong[0], Columns())).prompt.count("<|im_end|>") == 3


HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOSSY = {
    "the system message": HEAD.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}") + "{{ m.content }}" + TAIL,
    "all but the last turns": HEAD.replace("in messages", "in messages[-3:]") + "{{ m.content }}" + TAIL,
    "the end of long messages": HEAD + "{{ m.content[:30] }}" + TAIL,
    "words": HEAD + "{{ m.content | replace('Paris', '') }}" + TAIL,
    "case": HEAD + "{{ m.content | lower }}" + TAIL,
}  # fmt: skip
WHOLE = [HEAD + "{{ m.content }}" + TAIL, HEAD + "{{ m.content | trim }}" + TAIL]


def long_row():
    turns = [("system", "Be BRIEF."), ("user", "Where?"), ("assistant", "Here."), ("user", "And who are they?")]
    history = [{"role": role, "content": content} for role, content in turns]
    answers = [
        {"role": "assistant", "content": f" The people of Paris, {word} the others. \n"} for word in ("and", "not")
    ]
    return {"chosen": [*history, answers[0]], "rejected": [*history, answers[1]]}


@pytest.mark.parametrize("name", LOSSY)
def test_a_template_that_drops_or_cuts(tokenizer, name):
    with pytest.raises(RowError, match="^odd leaves out or cuts") as told:
        Renderer(tokenizer, LOSSY[name], "odd").render(conversations(long_row(), Columns()))
    assert told.value.reason == "text left out by the template"


@pytest.mark.parametrize("template", WHOLE)
def test_a_template_that_trims_is_taken(tokenizer, template):
    rendered = Renderer(tokenizer, template).render(conversations(long_row(), Columns()))
    assert "The people of Paris, and the others." in rendered.chosen


def test_a_template_without_tools_or_thinking(tokenizer):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    thought = {"role": "assistant", "content": "a", "reasoning_content": "because of this"}
    for lost in (
        {"tools": tools},
        {"chosen": [{**thought}]},
        {"chosen": [{"role": "assistant", "content": "a", "tool_calls": [call]}]},
    ):
        with pytest.raises(RowError, match="leaves out"):
            Renderer(tokenizer, WHOLE[0]).render(FORMATS["chat"]({**row, **lost}, Columns()))


def test_thinking_of_earlier_turns_may_be_left_out():
    turns = [("user", "q"), ("assistant", "<think>\nhm\n</think>\n\nfirst"), ("user", "and?")]
    history = [{"role": role, "content": content} for role, content in turns]
    row = {
        "chosen": [*history, {"role": "assistant", "content": "a"}],
        "rejected": [*history, {"role": "assistant", "content": "b"}],
    }
    rendered = Renderer(templates.tokenizer("qwen3"), template_kwargs={"enable_thinking": False}).render(
        conversations(row, Columns())
    )
    assert "first" in rendered.prompt
    assert "hm" not in rendered.prompt


@pytest.fixture(scope="module")
def words():
    """A tokenizer that knows a few words and no letters."""
    known = ["<unk>", "<s>", "</s>", "[U]", "[A]", "yes", "no", "good", "question"]
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    wrapped.add_special_tokens({"additional_special_tokens": ["[U]", "[A]"]})
    wrapped.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[U] {{ m.content }}{% else %}{{ m.content }}</s>{% endif %}"
        "{% if m.role == 'user' and (not loop.last or add_generation_prompt) %} [A] {% endif %}{% endfor %}"
    )
    return wrapped


def test_unknown_tokens_and_pairs_of_equal_ids_are_counted(words, tmp_path):
    pairs = [
        ("good question", "yes", "no"),
        ("question", "yes maybe", "no"),
        ("question", "yes  yes", "yes yes"),
        ("why", "a", "b"),
    ]
    file = write_rows(tmp_path / "rows.jsonl", [chat_row(*pair) for pair in pairs])
    data, audit = preparation(words, file).load_or_run(tmp_path / "store")
    assert data["row"][:] == [1]
    assert audit["left_out"] == {"unknown token": 2, "identical as tokens": 1}
    assert [example["row"] for example in audit["examples"]] == [2, 3, 4]
    with pytest.raises(DataError, match=r"3 of 4 rows \(75%\).*row 2: the tokenizer has no token for 1 piece"):
        preparation(words, file, max_bad_rows=0.5).load_or_run(tmp_path / "store")


def test_128_pairs_of_unknown_words_are_refused(words, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [chat_row("question", f"word{n}", f"other{n}") for n in range(128)])
    with pytest.raises(DataError, match="no usable row out of 128"):
        preparation(words, file).load_or_run(tmp_path / "store")


def test_an_unknown_token_that_also_ends_texts_counts_nothing(tokenizer, words):
    assert Renderer(words).unknown_id == 0
    shared = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, unk_token="</s>", eos_token="</s>")
    assert Renderer(shared).unknown_id is None
    assert Renderer(tokenizer).unknown_id is None
