"""The chat templates that axolotl ships, each with a tokenizer that has its special tokens."""

from __future__ import annotations

import copy
import re
from functools import cache
from typing import Any

from tokenizers import AddedToken

from tests.support import tiny

# Forms of control tokens in the templates' sources.
_TOKENS = re.compile(
    r"<\|[^|<>\s'\"]+\|>|<｜[^｜]+｜>|\[/?[A-Z_]+\]|<\|[a-z_]+>|<[a-z_]+\|>|\[\|[a-z]+\|\]|</?s>|<(?:start|end)_of_turn>"
)

VISION = {"llava", "llama3_2_vision", "pixtral", "qwen2_vl", "gemma4", "gemma4_unified"}
"""Templates of models that see; the text-only rule is held on the others, and where these can keep it too."""

CANNOT = {"llava", "gemma4", "gemma4_unified"}
"""Templates that end an answer with no special token, or do not continue their own generation prompt."""


def names() -> list[str]:
    from axolotl.utils.chat_templates.base import _CHAT_TEMPLATES

    return sorted(_CHAT_TEMPLATES)


@cache
def tokenizer(name: str) -> Any:
    from axolotl.utils.chat_templates import get_chat_template

    source = get_chat_template(name)
    made = copy.deepcopy(tiny.tokenizer())
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    made.add_tokens([AddedToken(token, special=True) for token in sorted(set(_TOKENS.findall(source)))])
    made.chat_template = source
    return made
