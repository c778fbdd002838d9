"""Samples of the campaigns in tests/fuzz; FUZZ_CASES=2000 runs them whole."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from dpo_plugin.data import render
from dpo_plugin.data.render import Renderer
from dpo_plugin.engines.config import read_deepspeed
from dpo_plugin.errors import ConfigError, TemplateError
from dpo_plugin.host.output_dir.lock import LOCK, hold, release
from dpo_plugin.samples.pairing import AnswersFile
from dpo_plugin.samples.records import keep_until
from tests.fuzz import logs, prepared, rows, templates
from tests.support import templates as templates_of

CHATML = templates_of.tokenizer("chatml").chat_template
CASES = int(os.environ.get("FUZZ_CASES", "0"))


@pytest.mark.parametrize("kind", rows.KINDS)
def test_hostile_rows_are_kept_as_given_or_counted(tokenizer, tmp_path, kind):
    renderer = Renderer(tokenizer)
    found = set()
    for number, case in enumerate(rows.cases(1, CASES or 240)):
        if case.kind == kind:
            folder = tmp_path / str(number)
            folder.mkdir()
            found.add(rows.check(case, renderer, folder))
    assert found == {"read"}


def test_damaged_folders_never_give_other_ids():
    found = prepared.run(1, CASES or 90)
    assert found.total() == (CASES or 90)
    assert {name.split()[1] for name in found} <= {"same", "DataError"}
    assert not [name for name in found if name.endswith("DataError") and name.split()[0] not in ("beside", "forbid")]


def test_templates_that_attack_render_every_message_or_are_refused(tmp_path):
    found = set()
    for case in templates.cases(1, CASES or 80):
        found.add(templates.check(case, tmp_path, seconds=0.3))
    assert {"rendered", "TemplateError"} <= found <= {"rendered", "RowError", "TemplateError"}


@pytest.mark.parametrize("payload", [*templates.ESCAPES, *templates.ENDLESS])
def test_each_attack_is_rendered_as_text_or_refused(tmp_path, payload):
    """Some of which none is drawn above."""
    case = templates.Case("attack", "chatml", payload + CHATML)
    assert templates.check(case, tmp_path, seconds=0.3) in ("rendered", "RowError", "TemplateError")


def test_a_template_without_end_is_refused_in_time(monkeypatch):
    monkeypatch.setattr(render, "LONGEST_RENDERING", 0.2)
    renderer = Renderer(templates_of.tokenizer("chatml"), templates.ENDLESS[0] + CHATML)
    with pytest.raises(TemplateError, match=r"it took longer than 0.2 s, which is one question and one answer"):
        renderer.render(templates.PAIR)


def test_a_renderer_of_another_thread_has_no_limit_and_works():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(Renderer(templates_of.tokenizer("chatml")).render, templates.PAIR).result().chosen


def test_damaged_logs_give_a_report_or_one_line():
    assert set(logs.campaign(1, CASES or 10)) <= {
        f"{file}: {end}" for file in logs.FILES for end in ("written", "DataError")
    }


NESTED = "[" * 100_000


def test_json_that_is_nested_too_deep_is_damaged_json_everywhere(tmp_path):
    """Python's reader raises RecursionError, which is no ValueError."""
    file = tmp_path / "zero.json"
    file.write_text(NESTED, encoding="utf-8")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_deepspeed(str(file))
    answers = tmp_path / "answers.jsonl"
    answers.write_text(f"{NESTED}\n{NESTED}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not a file of answers"):
        AnswersFile(answers, {}, at_a_time=1, total=1)
    samples = tmp_path / "samples.jsonl"
    samples.write_bytes(b'{"step": 1, "prompt": "\xff"}\n' + NESTED.encode() + b'\n{"step": 3}\n')
    keep_until(samples, 2)
    assert samples.read_bytes() == b'{"step": 1, "prompt": "\xff"}\n'
    (tmp_path / LOCK).write_text(NESTED, encoding="utf-8")
    hold(tmp_path)  # takes an incomplete lock over
    release(tmp_path)
    assert not (tmp_path / LOCK).exists()
