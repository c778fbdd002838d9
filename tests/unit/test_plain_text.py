"""What data says is shown, not obeyed: in terminal, log, model card, tracker and chart."""

import io
import json

import pytest
from rich.console import Console

from dpo_plugin.data.audit import Audit, audit_lines
from dpo_plugin.health.history import Series
from dpo_plugin.host.commands.compare import Comparison, Figures
from dpo_plugin.host.commands.preview import pair_text
from dpo_plugin.host.output_dir.card import model_card
from dpo_plugin.report.charts import Chart, Line, to_svg
from dpo_plugin.samples.records import Answer, Sample, samples_markdown, samples_table
from tests.support.prepared import in_memory
from tests.support.tiny import chat_row, write_rows
from tests.unit.data.test_prepare import preparation

HOSTILE = "a\x1b[31m\x9b2J\r\nkept 0\n```\n# b \u202ec `d` $\\frac{$ <b>[red]e[/nope] :smile: ![x](http://y) ~f~ &lt; |"
OBEYED = ["\x1b", "\x9b", "\r", "\u202e"]


def terminal(*parts):
    """What the commands write of parts."""
    out = io.StringIO()
    console = Console(file=out, width=400, soft_wrap=True, highlight=False, color_system=None)
    for part in parts:
        console.print(part)
    return out.getvalue()


def hostile_audit(tokenizer, folder):
    rows = [chat_row(f"q{n}", "yes", "no", HOSTILE if n else "plain") for n in range(4)]
    rows += [
        {
            "chosen": [{"role": HOSTILE, "content": "a"}],
            "rejected": [{"role": HOSTILE, "content": "b"}],
            "source": HOSTILE,
        }
    ]
    return preparation(tokenizer, write_rows(folder / "rows.jsonl", rows)).load_or_run(folder / "store")


def test_in_the_audit(tokenizer, tmp_path):
    data, audit = hostile_audit(tokenizer, tmp_path)
    assert not [
        text for text in (*data["source"], *audit["by_source"]) if any(char in text for char in [*OBEYED, "\n"])
    ]
    assert "a\\x1b[31m\\x9b2J\\r\\nkept 0" in data["source"][1]
    lines = audit_lines([audit])
    assert len(lines) == len("\n".join(lines).splitlines())
    assert not [line for line in lines if line.startswith("kept")]


def test_in_the_audit_of_an_older_run():
    audit = Audit()
    audit.kept.update({HOSTILE: 1, "b": 1})
    older = {"where": "datasets[0]", "path": HOSTILE, **audit.to_dict()}
    assert not [line for line in audit_lines([older]) if any(char in line for char in [*OBEYED, "\n"])]


def test_a_long_message_is_cut():
    audit = Audit()
    audit.leave_out(1, "", "malformed", "x" * 1_000_000)
    assert len(audit.examples[0]["message"]) == 200


def test_in_the_card(tokenizer, tmp_path):
    _, audit = hostile_audit(tokenizer, tmp_path)
    (tmp_path / "data_audit.json").write_text(json.dumps({"datasets": [audit]}))
    card = model_card(tmp_path, "base", {}, [], True)
    assert card.splitlines().count("```") == 2
    assert not [char for char in OBEYED if char in card]


@pytest.mark.parametrize("text", [HOSTILE, "two\nlines\tand a tab"])
def test_in_the_preview(tokenizer, tmp_path, text):
    data = in_memory(
        preparation(tokenizer, write_rows(tmp_path / "rows.jsonl", [chat_row(text, text + " yes", "no")]))
    )[0]
    shown = terminal(*pair_text(data[0], tokenizer, "right"))
    assert not [char for char in OBEYED if char in shown]
    assert "[red]e[/nope]" in shown or "two\nlines" in shown
    assert text.count("\n") * 2 + 2 <= shown.count("\n")


def test_in_samples():
    sample = Sample(1, HOSTILE, Answer(HOSTILE, 3, True, 0.5), None)
    shown = terminal(samples_table([sample], "samples"))
    assert not [char for char in OBEYED if char in shown]
    *_, row = samples_markdown([sample]).splitlines()
    assert row.startswith("| a\\\\x1b[31m")
    assert not [char for char in OBEYED if char in row]
    for markup in ("\\`d\\`", "\\$\\\\frac{\\$", "\\<b\\>", "![x]\\(http", "\\~f\\~", "\\&lt;"):
        assert markup in row


def test_in_compare():
    figures = Figures(1.0, 0.5, 2)
    shown = terminal(*Comparison("policy", "reference", None, [], figures, {"[red]e[/nope]": figures}).parts())
    assert "[red]e[/nope]" in shown


@pytest.mark.parametrize("label", [r"$\frac{$", "$x$", r"$\nonsense$"])
def test_in_a_chart(label):
    series = Series()
    series.steps.extend([1, 2])
    series.values.extend([0.5, 0.7])
    drawn = to_svg(Chart("sources", "Accuracy by source", "about", [Line(label, series), Line("other", series)]))
    assert label in drawn
