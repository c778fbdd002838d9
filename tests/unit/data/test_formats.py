"""Every format on rows shaped like the public sets it serves, and on rows it must refuse."""

import json

import pytest

from dpo_plugin.data.formats import FORMATS, Columns, recognise
from dpo_plugin.errors import RowError
from dpo_plugin.types import PreferencePair, RenderedPair


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}

# Columns as the data cards of the public sets show them; texts are made.
PUBLIC = {
    "mlabonne/orpo-dpo-mix-40k": (
        "conversations",
        {"source": "Airoboros", "prompt": "Hi?", "question": "Hi?", "chosen": [user("Hi?"), bot("Yes.")], "rejected": [user("Hi?"), bot("No.")]},
        ([user("Hi?")], [bot("Yes.")], [bot("No.")]),
    ),
    "jondurbin/truthy-dpo-v0.1": (
        "prompt",
        {"id": "1", "source": "truthy_dpo", "system": "Be kind.", "prompt": "Hi?", "chosen": "Yes.", "rejected": "No."},
        ([SYSTEM, user("Hi?")], [bot("Yes.")], [bot("No.")]),
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        "conversations",
        {"prompt": "Hi?", "prompt_id": "x", "chosen": [user("Hi?"), bot("Yes.")], "rejected": [user("Hi?"), bot("No.")], "messages": [user("Hi?"), bot("Yes.")], "score_chosen": 8.0},
        ([user("Hi?")], [bot("Yes.")], [bot("No.")]),
    ),
    "Anthropic/hh-rlhf": (
        "hh_rlhf",
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant: Yes: please.", "rejected": "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant: No."},
        ([user("Hi?"), bot("Hello."), user("Tea?")], [bot("Yes: please.")], [bot("No.")]),
    ),
    "Intel/orca_dpo_pairs": (
        "question",
        {"system": "", "question": "Hi?", "chosen": "Yes.", "rejected": "No."},
        ([user("Hi?")], [bot("Yes.")], [bot("No.")]),
    ),
    "argilla/distilabel (messages)": (
        "messages",
        {"messages": [SYSTEM, user("Hi?")], "chosen": bot("Yes."), "rejected": bot("No.")},
        ([SYSTEM, user("Hi?")], [bot("Yes.")], [bot("No.")]),
    ),
    "ShareGPT keys": (
        "conversations",
        {"chosen": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}], "rejected": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "No."}]},
        ([user("Hi?")], [bot("Yes.")], [bot("No.")]),
    ),
    "TRL conversational": (
        "prompt",
        {"prompt": [user("Hi?")], "chosen": [bot("Yes.")], "rejected": [bot("No.")]},
        ([user("Hi?")], [bot("Yes.")], [bot("No.")]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_shape_is_recognised_and_read(name):
    kind, row, (prompt, chosen, rejected) = PUBLIC[name]
    assert recognise(row, Columns()) == kind
    for read in (FORMATS["chat"], FORMATS[kind]):
        pair = read(row, Columns())
        assert isinstance(pair, PreferencePair)
        assert (list(pair.prompt), list(pair.chosen), list(pair.rejected)) == (prompt, chosen, rejected)
        assert pair.source == (row.get("source") or "")


def test_ultrafeedback_checks_its_prompt_column():
    row = PUBLIC["HuggingFaceH4/ultrafeedback_binarized"][1]
    assert FORMATS["ultrafeedback"](row, Columns()).prompt == [user("Hi?")]
    with pytest.raises(RowError, match="`prompt` is not what the user says first"):
        FORMATS["ultrafeedback"]({**row, "prompt": "Other?"}, Columns())


def test_rendered_text_passes_through():
    row = {"prompt": "Q: Hi?\nA:", "chosen": " Yes.", "rejected": " No.", "source": "x"}
    assert FORMATS["text"](row, Columns()) == RenderedPair("Q: Hi?\nA:", " Yes.", " No.", "x")


def test_columns_and_roles_can_be_mapped():
    columns = Columns(prompt="ask", chosen="good", rejected="bad", roles={"visitor": "user", "host": "assistant"})
    row = {"ask": [{"role": "visitor", "content": "Hi?"}], "good": {"role": "host", "content": "Yes."}, "bad": "No."}
    pair = FORMATS["chat"](row, columns)
    assert (list(pair.prompt), list(pair.chosen), list(pair.rejected)) == ([user("Hi?")], [bot("Yes.")], [bot("No.")])


def test_tools_reasoning_and_template_arguments_are_kept():
    call = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}
    row = {
        "prompt": "1+1?",
        "chosen": [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": json.dumps([call]),
                "reasoning_content": "Add.",
                "name": None,
            },
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            bot("Two."),
        ],
        "rejected": "Three.",
        "tools": json.dumps([{"name": "sum"}]),
        "chat_template_kwargs": {"enable_thinking": False, "other": None},
    }
    pair = FORMATS["chat"](row, Columns())
    assert pair.tools == [{"name": "sum"}]
    assert pair.template_kwargs == {"enable_thinking": False}
    assert pair.chosen[0] == {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "Add."}
    assert pair.chosen[1] == {"role": "tool", "content": "2", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "a"}, "`rejected` is missing"),
        ({"chosen": "a", "rejected": ""}, "`rejected` is empty"),
        ({"chosen": "a", "rejected": "b"}, "none of `messages`, `prompt`, `question`"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "equal"),
        ({"prompt": "q", "chosen": " ", "rejected": "b"}, "`chosen` ends with an empty answer"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "`prompt` is int, not a list"),
        ({"prompt": [user("q"), bot("x")], "chosen": "a", "rejected": "b"}, "nothing to answer"),
        ({"prompt": [SYSTEM, user("q")], "system": "Be rude.", "chosen": "a", "rejected": "b"}, "both bring a system message"),
        ({"prompt": "q", "system": 3, "chosen": "a", "rejected": "b"}, "`system` is int"),
        ({"prompt": "q", "chosen": {"role": "narrator", "content": "a"}, "rejected": "b"}, "unknown role 'narrator'"),
        ({"prompt": "q", "chosen": [bot("a"), user("b")], "rejected": "b"}, "ends with the user"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "tools": "{no json"}, "`tools` is text that is not valid JSON"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "tools": {"a": 1}}, "`tools` is dict, not a sequence"),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "plain"}, "does not begin with"),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant:", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}, "empty answer"),
        ({"prompt": "q", "chosen": {"role": "assistant", "content": [{"type": "text"}]}, "rejected": "b"}, "content is list, not text"),
    ],
)  # fmt: skip
def test_a_row_that_says_no_clear_thing_is_refused(row, reason):
    with pytest.raises(RowError, match=reason):
        FORMATS["chat"](row, Columns())
