"""Chat templates that attack, or were damaged: each renders every message as given, or is refused in one line.

`python -m tests.fuzz.templates --cases 1000` runs a campaign.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from dpo_plugin.data import render
from dpo_plugin.data.render import Renderer
from dpo_plugin.errors import RowError, TemplateError
from dpo_plugin.types import Message, PreferencePair
from tests.support import templates

SENTINEL = "was-here"
SHELL = f"touch {SENTINEL}"
ESCAPES = [
    f"{{{{ cycler.__init__.__globals__.os.system('{SHELL}') }}}}",
    f"{{{{ lipsum.__globals__['os'].popen('{SHELL}').read() }}}}",
    f"{{{{ self.__init__.__globals__.__builtins__.__import__('os').system('{SHELL}') }}}}",
    f"{{{{ ''.__class__.__mro__[1].__subclasses__() | map('string') | join }}}}{{% set x = '{SHELL}' %}}",
    f"{{{{ raise_exception.__globals__['os'].system('{SHELL}') }}}}",
    f"{{{{ strftime_now.__globals__['os'].system('{SHELL}') }}}}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '%s' | format(messages.__class__) }}",
    "{{ (messages | attr('__class__')) | attr('__mro__') }}",
    "{% set f = messages.append %}{{ f({'role': 'user', 'content': 'planted'}) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'content': 'planted'}) }}",
    "{{ messages.pop() }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as stolen %}{{ stolen }}",
    "{% extends '/etc/passwd' %}",
    "{{ open('/etc/passwd').read() }}",
    "{{ config }}{{ request }}{{ environ }}",
]
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in range(10**12) %}{{ a }}{% endfor %}",
    "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
    "{% macro twice(n) %}{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}{% endmacro %}{{ twice(60) }}",
    "{{ ('(' * 4000) ~ (')' * 4000) }}",
    "{% set ns = namespace(text='a') %}{% for i in range(26) %}{% set ns.text = ns.text ~ ns.text %}{% endfor %}{{ ns.text | length }}",
]
WRONG = [
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    "{{ undefined.attribute }}",
    "{{ messages[99]['content'] }}",
    "{% for",
    "{{",
    "{% endfor %}",
    "{% if true %}",
    "{# no end",
    "\x00",
    "\ud800",
    "{{ messages[-1]['content'][:3] }}",
    "{{ messages | length }}",
    "{% set messages = messages[1:] %}",
    "{% set messages = messages[:1] %}",
    "{% set messages = messages | reverse | list %}",
    "{% set add_generation_prompt = not add_generation_prompt %}",
    "{{ strftime_now('%S') }}",
    "{{ range(9) | random }}",
    "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "</s>",
]
PAYLOADS = {"escape": ESCAPES, "endless": ENDLESS, "wrong": WRONG}
KINDS = (*PAYLOADS, "damaged")


@dataclass(frozen=True)
class Case:
    """One template.

    Attributes:
        kind: One of `KINDS`.
        name: The shipped template that it was made of.
        source: Its text.
    """

    kind: str
    name: str
    source: str


def cases(seed: int, count: int) -> Iterator[Case]:
    """Templates of all kinds in turn, each made of one that axolotl ships."""
    draw = random.Random(seed)
    names = [name for name in templates.names() if name not in templates.VISION]
    for number in range(count):
        kind, name = KINDS[number % len(KINDS)], draw.choice(names)
        source = str(templates.tokenizer(name).chat_template)
        if kind == "damaged":
            yield Case(kind, name, _damaged(source, draw))
        else:
            payload, at = draw.choice(PAYLOADS[kind]), draw.choice([0, len(source), _in_loop(source)])
            yield Case(kind, name, source[:at] + payload + source[at:])


def _in_loop(source: str) -> int:
    found = source.find("%}", max(0, source.find("for ")))
    return found + 2 if found >= 0 else 0


def _damaged(source: str, draw: random.Random) -> str:
    for _ in range(draw.choice([1, 1, 2, 5])):
        begin = draw.randrange(len(source))
        end = begin + draw.choice([1, 3, 12, 60])
        other = draw.randrange(len(source))
        piece = draw.choice(
            ["", source[begin:end] * 2, source[other : other + end - begin], source[begin:end].swapcase()]
        )
        source = source[:begin] + piece + source[end:]
    return source


PAIR = PreferencePair(
    [
        Message(role="user", content="firstQuestion"),
        Message(role="assistant", content="firstAnswer"),
        Message(role="user", content="secondQuestion"),
    ],
    [Message(role="assistant", content="goodAnswer")],
    [Message(role="assistant", content="badAnswer")],
)


def check(case: Case, folder: Path, seconds: float = 1.0) -> str:
    """What became of a case: ``rendered``, or the name of the error; fails if it hangs, escapes or loses a message."""
    messages = [dict(one) for one in (*PAIR.prompt, *PAIR.chosen, *PAIR.rejected)]
    tokenizer, began = templates.tokenizer(case.name), time.monotonic()
    try:
        with contextlib.chdir(folder), mock.patch.object(render, "LONGEST_RENDERING", seconds):
            found = Renderer(tokenizer, case.source).render(PAIR)
    except (RowError, TemplateError) as error:
        return type(error).__name__ if len(str(error)) < 1000 else "too long an error"
    finally:
        assert time.monotonic() - began < 20 * seconds, case
        assert not [*folder.iterdir()], case
        assert messages == [dict(one) for one in (*PAIR.prompt, *PAIR.chosen, *PAIR.rejected)], case
    texts = [found.prompt, found.chosen, found.rejected]
    said = [("firstQuestion", "firstAnswer", "secondQuestion"), ("goodAnswer",), ("badAnswer",)]
    for text, own in zip(texts, said, strict=True):
        for words in said:
            assert all((word in text) == (words is own) for word in words), (case, texts)
    return "rendered"


def campaign(seed: int, count: int) -> Counter[str]:
    """Run cases; returns how many ended how."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(seed, count):
            found[f"{case.kind}: {check(case, Path(folder))}"] += 1
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for outcome, number in sorted(campaign(arguments.seed, arguments.cases).items()):
        print(f"{number:6d}  {outcome}")
