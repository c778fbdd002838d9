"""Reading what a run left behind, whole or damaged, and the page that is made of it."""

import html
import json
import math
import re
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dpo_plugin import registry
from dpo_plugin.errors import DataError
from dpo_plugin.health.checks import CHECKS
from dpo_plugin.health.history import History, Series
from dpo_plugin.host.commands.cli import dpo
from dpo_plugin.metrics.aggregates import MetricMeans
from dpo_plugin.metrics.fields import explain
from dpo_plugin.metrics.pair import METRICS
from dpo_plugin.registry import Names
from dpo_plugin.report.charts import (
    BUCKETS,
    Chart,
    Line,
    as_arrays,
    draw,
    smoothed,
    thinned,
    to_svg,
)
from dpo_plugin.report.page import number
from dpo_plugin.report.panels import MARKED_ON, PANELS, charts, comparison, ranked, reward_charts
from dpo_plugin.report.report import verdict, write_report
from dpo_plugin.report.run_folder import LOG, RUN, SAMPLES, STATE, log_text, read_run
from dpo_plugin.report.shown import shown_settings, shown_text
from dpo_plugin.types import Finding
from tests.unit.health.test_health import recorded
from tests.unit.metrics.test_metrics import some_pairs

NOT_RECORDED = {"losses", "entropy", "drift", "speed", "logits", "win_rate", "score", "divergence"}
"""Panels of fields that came after the runs were recorded."""


def folder(path: Path, name: str = "healthy", **more: Any) -> Path:
    """An output folder with a recorded run's log, audit and settings."""
    lines, facts, audits = recorded(name)
    path.mkdir(parents=True, exist_ok=True)
    (path / LOG).write_text("".join(map(log_text, lines)), encoding="utf-8")
    (path / "data_audit.json").write_text(json.dumps({"datasets": audits}), encoding="utf-8")
    config = {"rl": "dpo", "learning_rate": facts.learning_rate, "dpo_plugin": {"reference": {"strategy": "adapter"}}}
    (path / RUN).write_text(json.dumps({"facts": asdict(facts), "config": config, **more}), encoding="utf-8")
    return path


def state(path: Path, lines: Any, **more: Any) -> Path:
    """A trainer state; ``path`` is the checkpoint's folder."""
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"log_history": lines, "max_steps": 66, "num_train_epochs": 2, **more}, indent=2, sort_keys=True)
    (path / STATE).write_text(text, encoding="utf-8")
    return path / STATE


def written(runs: Any, path: Path) -> str:
    return write_report(runs, path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def healthy_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("healthy")
    return written([read_run(folder(path))], path)


def body(page: str) -> str:
    return page[page.index("<body>") : page.index("</body>")]


# ── reading ──


def test_a_whole_run_is_read(tmp_path: Path):
    lines, facts, audits = recorded("healthy")
    run = read_run(folder(tmp_path / "out"))
    assert (run.name, run.read, run.notes, run.findings) == ("out", LOG, [], [])
    assert run.history.facts.learning_rate == facts.learning_rate
    assert run.history.audits == audits
    expected = [line["loss"] for line in lines if "loss" in line]
    assert list(run.history["loss"].values) == pytest.approx(expected, rel=1e-5)


def test_the_log_of_the_furthest_checkpoint_is_read_where_there_is_no_other(tmp_path: Path):
    lines, _, _ = recorded("healthy")
    state(tmp_path / "checkpoint-9", lines[:5])
    state(tmp_path / "checkpoint-66", lines)
    state(tmp_path, lines[:3])
    run = read_run(tmp_path)
    assert run.read == f"checkpoint-66/{STATE}"
    assert run.history.step == 66
    assert run.history.facts.planned_steps == 66
    assert run.findings == []


def test_findings_are_made_from_the_log_if_none_were_written(tmp_path: Path):
    made = {finding.check for finding in read_run(folder(tmp_path, "diverged")).findings}
    assert made == {"accuracy_at_chance", "likelihood_displacement", "loss_diverged", "margin_not_rising"}


def test_the_command_replays_what_is_registered_without_what_the_config_switches_off(tmp_path: Path, monkeypatch: Any):
    def theirs(history: Any) -> Finding | None:
        return Finding("theirs saw it", "Look. Write: a: b") if history.step >= 33 else None

    def broken(history: Any) -> Finding | None:
        raise KeyError("x")

    checks = Names("health check")
    for name, check in {**CHECKS, "theirs": theirs, "broken": broken}.items():
        checks.add(name, check, "dpo_plugin" if name in CHECKS else "their-package")
    monkeypatch.setattr(registry, "get_registry", lambda: SimpleNamespace(health_checks=checks))
    found = {}
    for name, health in {
        "all": {},
        "one off": {"checks": {"theirs": "off", "loss_diverged": False}},  # YAML reads a bare off as false
        "one on": {"action": "off", "checks": {"theirs": "stop"}},
    }.items():
        path = folder(tmp_path / name, "diverged")
        settings = {**json.loads((path / RUN).read_text()), "config": {"dpo_plugin": {"health": health}}}
        (path / RUN).write_text(json.dumps(settings), encoding="utf-8")
        result = CliRunner().invoke(dpo, ["report", str(path), "--json"])
        assert result.exit_code == 0, result.output
        record = json.loads(result.stdout)["runs"][0]
        found[name] = {one["check"]: one for one in record["findings"]}
    ours = {"accuracy_at_chance", "likelihood_displacement", "loss_diverged", "margin_not_rising"}
    assert set(found["all"]) == {*ours, "theirs", "broken"}
    assert "'broken' of their-package raised KeyError" in found["all"]["broken"]["message"]
    assert set(found["one off"]) == {*ours, "broken"} - {"loss_diverged"}
    assert set(found["one on"]) == {"theirs"}


def test_findings_that_were_written_are_taken(tmp_path: Path):
    one = Finding("it is odd", "Look. Write: a: b", "warning", 5, {"loss": 1.0}, "theirs", 9)
    assert read_run(folder(tmp_path, "diverged", findings=[asdict(one)])).findings == [one]


def test_a_log_that_was_cut_is_read_up_to_the_cut(tmp_path: Path):
    path = folder(tmp_path) / LOG
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: int(len(text) * 0.6)], encoding="utf-8")
    run = read_run(tmp_path)
    assert 30 < run.history.step < 66
    assert run.notes == [f"{LOG}: 1 incomplete or damaged line left out."]
    assert "The log ends at step" in written([run], tmp_path)


def test_a_folder_without_a_log_is_an_error_that_says_what_to_write(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no log in `.*empty`: neither dpo_log.jsonl nor .* Write: logging_steps: 1$"):
        read_run(tmp_path / "empty")
    with pytest.raises(DataError, match=r"`.*gone` is not a folder. Write .*axolotl dpo report <output_dir>$"):
        read_run(tmp_path / "gone")


def test_damaged_files_beside_the_log_are_said(tmp_path: Path):
    path = folder(tmp_path)
    (path / "data_audit.json").write_text('{"datasets": [', encoding="utf-8")
    (path / RUN).write_text("[]", encoding="utf-8")
    run = read_run(path)
    assert run.history.audits == []
    assert run.notes[0] == "data_audit.json is incomplete or damaged and was left out."


@pytest.mark.parametrize(
    "run",
    [
        {"findings": [{"odd": 1}]},
        {"findings": [{"message": "a", "advice": "b", "first_step": "c"}]},
        {"findings": 3, "facts": [], "config": "x"},
        {},
    ],
)
def test_a_settings_file_of_another_make_is_passed_over(tmp_path: Path, run: Any):
    path = folder(tmp_path, "diverged")
    (path / RUN).write_text(json.dumps(run), encoding="utf-8")
    (path / "data_audit.json").write_text(json.dumps({"datasets": ["x", 1]}), encoding="utf-8")
    assert "loss_diverged" in {finding.check for finding in read_run(path).findings}
    assert "8.57" in written([read_run(path)], tmp_path)


def sft_state(path: Path) -> None:
    state(
        path / "checkpoint-50",
        [{"step": s, "loss": 2 - s / 50, "grad_norm": 1.3, "learning_rate": 1e-4} for s in range(1, 51)],
    )


def test_a_trainer_state_without_rewards_is_explained_and_drawn(tmp_path: Path):
    sft_state(tmp_path)
    run = read_run(tmp_path)
    assert list(run.history["loss"].steps) == list(range(1, 51))
    assert run.history["learning_rate"].values[0] == 1e-4
    page = written([run], tmp_path)
    assert re.findall(r'<figure id="([^"]+)"', page)[:3] == ["loss", "gradient", "rate"]
    assert "The log has no rewards" in page
    assert verdict(run)[0] == "warning"


def test_a_plain_trl_log_says_what_it_lacks(tmp_path: Path):
    lines, _, _ = recorded("healthy")
    usual = (
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        *(
            name
            for name in METRICS
            if name.startswith("rewards/")
            and name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
        ),
    )
    state(tmp_path / "checkpoint-66", [{name: line[name] for name in usual if name in line} for line in lines])
    run = read_run(tmp_path)
    assert run.notes == [
        "The log is another trainer's or an older one: percentiles, sources and lengths are not in it."
    ]
    assert verdict(run)[0] == "good"


def test_a_logged_line_survives_its_text():
    line = {"step": 3, "loss": 0.69314718, "grad_norm": math.nan, "rewards/margins": -1.23456789e-7, "note": "x"}
    text = log_text(line)
    assert text.endswith("\n")
    back = json.loads(text)
    assert back["rewards/margins"] == pytest.approx(line["rewards/margins"], rel=1e-5)
    assert math.isnan(back["grad_norm"])
    assert (back["step"], back["note"]) == (3, "x")


# ── the page ──


def test_the_page_has_everything_and_the_verdict_first(tmp_path: Path):
    path = folder(tmp_path / "my run")
    rows = [
        {"prompt": "Q?", "policy": "Yes, gladly.", "reference": "Yes."},
        {"prompt": "<user>Hi", "question": "Hi", "policy": "Hello", "reference": "Hey", "margin": 0.25},
    ]
    (path / SAMPLES).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = body(written([read_run(path)], tmp_path))
    order = [
        "<h1>my run",
        "Nothing was found",
        "95.3% of 64 held-out pairs",
        "Curves",
        'id="loss"',
        "<h2>Data",
        "264 rows read",
        '<th scope="row">help_desk</th>',
        "<h2>Answers",
        ">Hi<",
        "Hello",
        "Q?",
        "Yes, gladly.",
        "Settings",
        "dpo_plugin.reference.strategy",
    ]
    places = [page.index(text) for text in order]
    assert places == sorted(places)
    for panel in PANELS:
        assert (f'<figure id="{panel.key}"' in page) == (panel.key not in NOT_RECORDED)
    assert page.count("<svg ") == page.count("<figcaption>") == len(PANELS) - len(NOT_RECORDED)


def test_every_field_is_listed_with_its_last_values(healthy_page: str):
    page = body(healthy_page)
    assert re.search(r"<code>grad_norm</code> <b>[\d.]+</b>", page)
    assert re.search(r"<code>rewards/accuracies</code> <b>[\d.]+%, held out 95.3%</b>", page)
    assert "built-in method" not in page


def test_every_chart_is_captioned_and_every_field_explained(healthy_page: str):
    page = body(healthy_page)
    for panel in PANELS:
        assert len(panel.caption) > 30
        caption = panel.caption.split(";")[0].replace("'", "&#39;").replace(">", "&gt;")
        assert (caption in page) == (panel.key not in NOT_RECORDED)
    metrics = MetricMeans(METRICS)
    metrics.update(some_pairs(30, sources=["a", "b/c"] * 15))
    for name in {*METRICS, *metrics.result()}:
        assert explain(name).endswith("."), name
        assert explain(f"eval_{name}").startswith("Held-out data: ")


def test_the_page_needs_no_network(healthy_page: str):
    page = healthy_page
    urls = set(re.findall(r"https?://[^\"'\s)<]+", page))
    assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<link|<img|<iframe|src=\"|@import|url\((?!#)", page)


def test_no_script_may_run(healthy_page: str):
    assert "<script" not in healthy_page
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\"" in healthy_page


def test_the_page_is_for_phones_and_for_the_dark(healthy_page: str):
    page = healthy_page
    assert 'content="width=device-width' in page
    assert re.search(r"\.wide\{[^}]*overflow-x:auto", page)  # a table wider than the screen scrolls by itself
    assert re.search(r"td\{[^}]*overflow-wrap:anywhere", page)
    assert "prefers-color-scheme: dark" in page
    drawn = "".join(re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL))
    assert "fill: #ffffff" not in drawn  # no background of its own
    assert re.search(r"figure svg\{width:100%", page)
    names = set(re.findall(r"var\((--\w+)\)", page))
    assert all(page.count(f"{name}:#") == 2 for name in names)


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """The ratio of WCAG 2.2 between two colours, each (3,) in 0..1."""
    linear = (np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in (one, other))
    low, high = sorted(float(c @ (0.2126, 0.7152, 0.0722)) for c in linear)
    return (high + 0.05) / (low + 0.05)


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255


def test_every_line_and_label_of_a_chart_stands_out_from_its_card(tmp_path: Path):
    """3 : 1 as WCAG 2.2 asks of graphics; in the dark, after the page's filter (Filter Effects 1, hueRotate by 180°)."""
    many = [Line(str(number), series([1.0, 2.0 + number])) for number in range(6)]
    drawn = to_svg(Chart("a", "a", "", many, (0.0, "zero"), marks={1: (1, 2)}, last=2))
    page = written([read_run(folder(tmp_path))], tmp_path)
    assert "figure svg{filter:invert(1) hue-rotate(180deg)}" in page
    light, dark = re.findall(r"--card:(#\w{6})", page)
    turn = 2 * np.array([[0.213, 0.715, 0.072]] * 3) - np.eye(3)
    strokes = set(re.findall(r"(?:stroke|fill): (#\w{6})", drawn)) - {"#000000", "#80868f"}  # unused ticks; the grid
    assert len(strokes) == 8
    for colour in map(rgb, strokes):
        assert contrast(colour, rgb(light)) >= 3
        assert contrast(np.clip(turn @ (1 - colour), 0, 1), rgb(dark)) >= 3


def test_findings_are_listed_and_marked_on_their_curves(tmp_path: Path):
    run = read_run(folder(tmp_path, "diverged"))
    page = body(written([run], tmp_path))
    assert page.index("1 fault") < page.index("12.8 times what it was at first") < page.index('id="loss"')
    assert page.count('<code class="write">learning_rate: 0.003</code>') == 4
    for place, finding in enumerate(run.findings, 1):
        figure = re.search(rf'<figure id="{MARKED_ON[finding.check]}".*?</figure>', page, flags=re.DOTALL).group()
        assert re.search(rf"font-weight: (bold|700)[^>]*>{place}</text>", figure)


def test_a_logarithmic_axis_has_numbers_and_no_markup():
    svg = to_svg(Chart("gradient", "Gradient norm", "", [Line("a", series([0.01, 3.0, 500.0]))], log=True))
    assert {"0.1", "100"} <= set(re.findall(r">([^<]+)</text>", svg))
    assert "mathdefault" not in svg


def test_every_check_has_a_curve_to_be_marked_on():
    assert set(MARKED_ON) == set(CHECKS)
    assert set(MARKED_ON.values()) <= {panel.key for panel in PANELS}


def test_another_packages_field_is_drawn_and_its_finding_marked_there_or_on_the_loss(tmp_path: Path):
    path = folder(tmp_path, findings=[asdict(Finding("odd", "Look. Write: a: b", first_step=20, check="theirs"))])
    lines = [{**line, "mine/number": 1.0 + line["step"]} for line in recorded("healthy")[0] if "loss" in line]
    (path / LOG).write_text("".join(map(log_text, lines)), encoding="utf-8")
    page = body(written([read_run(path)], tmp_path))
    assert '<figure id="field-mine-number"' in page
    assert ">1</text>" in re.search(r'<figure id="loss".*?</figure>', page, flags=re.DOTALL).group()


def test_what_comes_from_outside_is_escaped(tmp_path: Path):
    evil = "<script>alert(1)</script>"
    path = folder(tmp_path / "out", findings=[asdict(Finding(evil, f"{evil} Write: {evil}", check=evil))])
    (path / SAMPLES).write_text(json.dumps({"prompt": evil, "policy": evil, evil: 1}) + "\n", encoding="utf-8")
    lines = [{**line, evil: float(line["step"]), f"rewards/accuracies/{evil}": 0.5} for line in recorded("healthy")[0]]
    (path / LOG).write_text("".join(map(log_text, lines)), encoding="utf-8")
    run = read_run(path)
    run.name, run.notes = evil, [evil]
    assert evil not in written([run], tmp_path)
    assert evil not in written([run, read_run(folder(tmp_path / "b"))], tmp_path)


SECRETS = {
    "comet_api_key": "hush-1",
    "mlflow_tracking_uri": "https://me:hush-2@mlflow.example",
    "hf_use_auth_token": "hush-3",
    "wandb_run_id": "hush-4",
    "some_new_tracker": {"token": "hush-5"},
    "base_model": "https://me:hush-6@models.example/base?sig=hush-7",
    "datasets": [{"path": "s3://key:hush-8@bucket/rows.jsonl#hush-9", "type": "dpo_plugin.chat", "auth": "hush-a"}],
    "deepspeed": {"zero_optimization": {"stage": 3}, "comet": {"api_key": "hush-b"}},
    "learning_rate": 7e-4,
}


def test_settings_that_may_hold_a_secret_are_not_shown(tmp_path: Path):
    assert "hush" not in json.dumps(shown_settings(SECRETS))
    path = folder(tmp_path / "older", config=SECRETS)  # a file from before settings were chosen
    left = json.loads((path / RUN).read_text(encoding="utf-8"))
    left["facts"]["base"] = SECRETS["base_model"]
    (path / RUN).write_text(json.dumps(left), encoding="utf-8")
    (path / "data_audit.json").write_text(json.dumps({"datasets": SECRETS["datasets"]}), encoding="utf-8")
    page = written([read_run(path)], tmp_path)
    assert "hush" not in page
    assert "hush" not in written([read_run(path), read_run(folder(tmp_path / "b"))], tmp_path)
    shown = ("https://models.example/base", "s3://bucket/rows.jsonl", "deepspeed.zero_optimization.stage", "0.0007")
    assert all(text in page for text in shown)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/jane/models/base", "~/models/base"),
        ("adapter /home/jane/sft", "adapter ~/sft"),
        ("/home/jane", "~"),
        ("file:///home/jane/rows.jsonl", "file://~/rows.jsonl"),
        ("/home/janet/rows", "/home/janet/rows"),
        ("/mnt/home/jane/rows", "/mnt/home/jane/rows"),
    ],
)
def test_who_lives_here_is_not_shown(text: str, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/jane")
    assert shown_text(text) == expected
    monkeypatch.setenv("HOME", "/")  # of a container's user
    assert shown_text(text) == text
    monkeypatch.delenv("HOME")
    assert shown_text(text) == text


@pytest.mark.parametrize("path", ["/data/a@b/c", "org/model", "./x?y#z", "C:\\rows", "s3://bucket/a@b.jsonl"])
def test_paths_are_shown_as_they_are(path: str):
    assert shown_text(path) == path


@pytest.mark.parametrize("name", ["severity", "check", "message", "advice"])
def test_no_field_of_a_finding_is_markup(tmp_path: Path, name: str):
    evil = '"><script>alert(1)</script>'
    finding = asdict(Finding("it is odd", "Look. Write: a: b")) | {name: evil, "numbers": {evil: 1.0}}
    path = folder(tmp_path, findings=[finding])
    (path / "data_audit.json").write_text(json.dumps({"datasets": [{"where": evil, "kept": evil, "cut": None}]}))
    page = written([read_run(path)], tmp_path)
    assert "<script" not in page
    assert "alert(1)" not in page.replace("&#34;&gt;&lt;script&gt;alert(1)&lt;/script&gt;", "")


def test_several_runs_are_compared(tmp_path: Path):
    runs = [read_run(folder(tmp_path / "a/out")), read_run(folder(tmp_path / "b/out", "diverged"))]
    page = body(written(runs, tmp_path))
    assert "<h1>2 runs" in page
    assert "<th>out</th><th>out (2)</th>" in page[: page.index("Settings that differ")]
    differ = page[page.index("Settings that differ") : page.index("<h2>Curves")]
    assert all(text in differ for text in ("learning_rate", "0.0007", "0.03"))
    assert "strategy" not in differ
    figure = re.search(r'<figure id="all-loss-loss".*?</figure>', page, flags=re.DOTALL).group()
    assert ">out</text>" in figure
    assert ">out (2)</text>" in figure
    each = page[page.index("<h2>Each run") :]
    assert each.index("Nothing was found") < each.index("1 fault") < each.index("12.8 times")


def test_a_report_of_nothing_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="Write: axolotl dpo report <output_dir>$"):
        write_report([], tmp_path / "r.html")


# ── long histories ──


def series(values: Any) -> Series:
    made = Series()
    for step, value in enumerate(values, 1):
        made.steps.append(step)
        made.values.append(value)
    return made


def test_a_long_history_keeps_its_spikes_and_its_ends():
    draw = np.random.default_rng(0)
    values = draw.normal(0, 0.1, 100_003)
    values[[777, 54_321, 100_002]] = 9.0, -7.0, 5.0
    steps, kept = thinned(series(values))
    assert len(kept) <= 2 * BUCKETS + 2
    assert list(steps) == sorted(set(steps))
    assert {(778, 9.0), (54_322, -7.0), (100_003, 5.0)} <= set(zip(steps.tolist(), kept.tolist(), strict=True))
    assert all(values[step - 1] == value for step, value in zip(steps, kept, strict=True))


@pytest.mark.parametrize("count", [0, 1, 2, 2 * BUCKETS])
def test_a_short_history_is_kept_whole(count: int):
    made = series(range(count))
    assert np.array_equal(thinned(made), as_arrays(made))


def test_the_running_mean_is_one():
    values = np.random.default_rng(1).normal(3, 1, 3000)
    steps, means = smoothed(series(values))
    at = 1500
    nearest = int(np.abs(steps - at).argmin())
    middle = steps[nearest] - 1
    assert means[nearest] == pytest.approx(values[middle - 50 : middle + 51].mean())


def test_labels_of_small_numbers_keep_their_digits():
    svg = to_svg(Chart("rate", "Learning rate", "", [Line("rate", series([2e-5 * k for k in range(1, 9)]))]))
    assert "0.000050" in re.findall(r">([^<]+)</text>", svg)


def test_a_report_of_100_000_logged_steps_takes_less_than_5_seconds_and_5_megabytes(tmp_path: Path):
    train = [json.dumps(line)[1:].replace('"step"', '"was"') for line in recorded("healthy")[0] if "loss" in line]
    evaluation = [
        json.dumps(line)[1:].replace('"step"', '"was"') for line in recorded("healthy")[0] if "eval_loss" in line
    ]
    with (folder(tmp_path) / LOG).open("w", encoding="utf-8") as file:
        for step in range(1, 100_001):
            file.write(f'{{"step": {step}, {train[(step - 1) * len(train) // 100_000]}\n')
            if step % 10_000 == 0:
                file.write(f'{{"step": {step}, {evaluation[step % 3]}\n')
    started = time.process_time()
    page = write_report([read_run(tmp_path)], tmp_path / "report.html")
    assert time.process_time() - started < 5  # of this process; the machine may be busy with others
    assert page.stat().st_size < 5e6
    assert "<b>100,000</b>" in page.read_text(encoding="utf-8")


def test_a_single_logged_line_is_drawn(tmp_path: Path):
    (tmp_path / LOG).write_text(log_text({"step": 1, "loss": 0.6931, "rewards/margins": 0.0}), encoding="utf-8")
    assert '<figure id="loss"' in written([read_run(tmp_path)], tmp_path)


def test_nothing_but_not_a_number_is_said_and_does_not_break_the_page(tmp_path: Path):
    lines = [
        {"step": step, "loss": math.nan, "grad_norm": math.nan, "rewards/margins": math.nan} for step in range(1, 9)
    ]
    (tmp_path / LOG).write_text("".join(map(log_text, lines)), encoding="utf-8")
    run = read_run(tmp_path)
    assert [finding.check for finding in run.findings] == ["not_finite"]
    assert "NaN" in body(written([run], tmp_path))


def test_reading_needs_no_torch_model_and_no_host():
    assert torch is not None  # metrics do, runs do not
    import subprocess
    import sys

    code = "import sys, dpo_plugin.report.report; print(*[m for m in ('torch', 'axolotl', 'trl', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# ── as a person meets it ──


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.451867, "0.452"), (-3.0449, "−3.04"), (1234.56, "1,235"), (999.7, "1,000"), (999.4, "999"), (2e-05, "2e−05"), (0.1, "0.1"), (264, "264"),
     (100_000, "100,000"), (-12, "−12"), (1e300, "1e+300"), (math.nan, "nan"), (None, "–")],
)  # fmt: skip
def test_numbers_have_three_digits(value: Any, text: str):
    assert number(value) == text


def test_accuracies_are_shares_of_a_hundred_and_no_number_breaks(healthy_page: str):
    page = body(healthy_page)
    tiles = dict(re.findall(r"<b>([^<]*)</b><small>([^<]*)</small>", page))
    assert {value: label for label, value in tiles.items()}["accuracy, held out"] == "95.3%"
    assert all(len(value.strip("−%").replace(".", "").lstrip("0")) <= 3 for value in tiles), tiles
    assert re.search(r"\.tiles b\{[^}]*white-space:nowrap", healthy_page)


def test_the_four_main_curves_come_first_and_the_rest_is_folded(healthy_page: str):
    page = body(healthy_page)
    seen, folded = page[page.index("<h2>Curves") :].split("<summary>More curves", 1)
    assert re.findall(r'<figure id="([^"]+)"', seen) == ["loss", "accuracy", "margin", "rewards"]
    assert "<details>" in seen
    assert set(re.findall(r'<figure id="([^"]+)"', folded)) >= {"logps", "gradient", "rate", "displacement"}


def test_folded_curves_are_open_where_a_finding_is_marked_on_one(tmp_path: Path):
    assert "<details open><summary>More curves" in written([read_run(folder(tmp_path, "diverged"))], tmp_path)


def test_the_header_says_what_was_trained_on_what(tmp_path: Path):
    path = folder(tmp_path)
    left = json.loads((path / RUN).read_text())
    left["facts"] |= {"base": "org/base", "policy": "./sft", "reference": "adapter ./sft", "pairs": 264,
                      "hardware": "8 × NVIDIA H100"}  # fmt: skip
    (path / RUN).write_text(json.dumps(left), encoding="utf-8")
    with (path / LOG).open("a") as log:
        log.write(log_text({"step": 66, "train_runtime": 192.0, "train_loss": 0.5}))
    page = body(written([read_run(path)], tmp_path))
    about = re.sub(r"<[^>]+>", " ", page[page.index('<p class="about">') : page.index("verdict")])
    expected = "base org/base adapter ./sft reference adapter ./sft β 0.1 rate 0.0007 pairs 264 duration 3 min 12 s hardware 8 × NVIDIA H100"
    assert " ".join(about.split()).startswith(expected)


def test_every_chart_of_a_run_has_one_axis_of_steps():
    lines, facts, audits = recorded("healthy")
    history = History(facts, audits)
    for line in lines:
        history.add(line)
    axes = [draw(chart).axes[0] for chart in charts(history, [])]
    assert {one.get_xlabel() for one in axes} == {"step"}
    assert all(one.get_xlim() == pytest.approx((-1.32, 67.32)) for one in axes)


@pytest.mark.parametrize("value", [2e-5, 0.0, -3.0])
def test_what_is_constant_is_drawn_flat(value: float):
    wobble = [value * (1 + 1e-12 * step) for step in range(9)]
    axes = draw(Chart("rate", "Learning rate", "", [Line("rate", series(wobble))])).axes[0]
    low, high = axes.get_ylim()
    assert (low, high) == pytest.approx((-1, 1) if value == 0 else sorted((0, 2 * value)))


def test_rewards_and_log_probs_have_held_out_lines_and_logits_a_chart(healthy_page: str, tmp_path: Path):
    for key in ("rewards", "logps", "displacement"):
        figure = re.search(rf'<figure id="{key}".*?</figure>', healthy_page, flags=re.DOTALL).group()
        assert figure.count(", held out</text>") == 2, key
    lines = [{"step": step, "loss": 0.6, "logits/chosen": 1.0 + step, "logits/rejected": 2.0} for step in (1, 2, 3)]
    (tmp_path / LOG).write_text("".join(map(log_text, lines)), encoding="utf-8")
    assert '<figure id="logits"' in written([read_run(tmp_path)], tmp_path)


def test_the_rewards_of_pairs_are_drawn_at_the_start_and_the_end(tmp_path: Path):
    start = {"step": 0, "chosen": [0.0] * 4, "rejected": [0.0] * 4}
    end = {"step": 66, "chosen": [0.5, 1.0, 1.5, 1.0], "rejected": [-1.0, -2.0, -1.5, -1.0]}
    rewards = {"": {"start": start, "end": start}, "eval_": {"start": start, "end": end}}
    run = read_run(folder(tmp_path / "a", rewards=rewards))
    drawn = {chart.key: chart for chart in reward_charts(run.rewards)}
    assert list(drawn) == ["rewards-start", "rewards-end"]
    assert "4 held-out pairs by reward, at step 66" in drawn["rewards-end"].caption
    left, right = (draw(chart).axes[0] for chart in drawn.values())
    assert left.get_xlim() == right.get_xlim()
    page = written([run], tmp_path)
    assert page.index('id="rewards-start"') < page.index('id="rewards-end"') < page.index("More curves")
    assert read_run(folder(tmp_path / "b", rewards=[1])).rewards == {}


def test_nothing_is_ranked_before_the_first_update(tmp_path: Path):
    zero = {"rewards/accuracies": 0.0, "rewards/margins": 0.0, "rewards/accuracies/a": 0.0, "rewards/margins/a": 0.0,
            "rewards/accuracies/b": 0.0, "rewards/margins/b": 0.0, "lengths/accuracy_chosen_longer": 0.0}  # fmt: skip
    held_out = {f"eval_{name}": value for name, value in zero.items()}
    lines = [{"step": 0, "eval_loss": 0.6931, **held_out}, {"step": 1, "loss": 0.6931, **zero}]
    (tmp_path / LOG).write_text("".join(map(log_text, lines)), encoding="utf-8")
    run = read_run(tmp_path)
    page = body(written([run], tmp_path))
    assert "accuracy, " not in page
    assert "ranked right" not in page
    assert not re.findall(r'id="(accuracy|sources|length_accuracy)"', page)
    run.history.add({"step": 2, "rewards/accuracies": 0.0, "rewards/margins": -0.1})
    assert ranked(run.history, "rewards/accuracies").tail(5) == [(2, 0.0)]


def test_runs_are_compared_over_beta_and_seen_where_they_coincide(tmp_path: Path):
    runs = [read_run(folder(tmp_path / name)) for name in "ab"]
    page = written(runs, tmp_path)
    assert '<figure id="all-nats-rewards-margins"' in page
    row = re.search(r'<th scope="row">margin/β, held out, nats</th>(.*?)</tr>', page).group(1)
    shown = re.findall(r"<td[^>]*>([^<]+)</td>", row)
    assert float(shown[0]) == pytest.approx(10 * runs[0].history["eval_rewards/margins"].values[-1], rel=0.01)
    drawn = {chart.key: chart for chart in comparison({"a": runs[0].history, "b": runs[1].history})}
    margins = [10 * margin for margin in runs[0].history["rewards/margins"].values]
    assert list(drawn["all-nats-rewards-margins"].lines[0].series.values) == pytest.approx(margins)
    for key in ("all-loss-loss", "all-nats-rewards-margins"):
        first, second = draw(drawn[key]).axes[0].get_lines()[:2]
        assert first.get_linewidth() > 2 * second.get_linewidth()


def test_answers_are_one_card_per_prompt_latest_first_with_the_users_turn(tmp_path: Path):
    path = folder(tmp_path)
    turn = {"Why?": "<|user|>\nWhy?<|end|>\n<|assistant|>", "How?": "<|user|>\nHow?<|end|>\n<|assistant|>"}
    rows = [
        {"step": step, "prompt": prompt, "question": question, "reference": None,
         "policy": {"text": f"{question} at {step}", "tokens": 4, "ended": True, "reward": 0.12345}}
        for step in (10, 20) for question, prompt in turn.items()
    ]  # fmt: skip
    (path / SAMPLES).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = body(written([read_run(path)], tmp_path))
    page = page[page.index("<h2>Answers") :]
    assert page.count('class="card answers"') == 2
    places = [page.index(text) for text in ("How? at 20", "How? at 10", "Why? at 20", "Why? at 10")]
    assert places == sorted(places)
    assert "&lt;|user|&gt;" not in page
    assert page.count("reward 0.123</div>") == 4


@pytest.mark.parametrize("name", ["a $x$ b", "$\\frac{1$", "<b>&amp;", "100 %"])
def test_names_in_charts_are_text(name: str):
    chart = Chart("loss", name, "", [Line(name, series([1.0, 2.0]))])
    assert html.escape(name, quote=False) in to_svg(chart)


def test_the_score_is_drawn_against_the_divergence_where_both_were_sampled(tmp_path: Path):
    history = History()
    lines = [{"samples/score": 0.2, "samples/divergence": 0.01}, {"samples/score": 0.3}]
    for step, line in enumerate([*lines, {"samples/score": 0.5, "samples/divergence": 0.4}]):
        history.add({"step": step, **line})
    (chart,) = (chart for chart in charts(history, []) if chart.key == "score-divergence")
    (line,) = chart.lines
    assert list(zip(line.series.steps, line.series.values, strict=True)) == [(0.01, 0.2), (0.4, 0.5)]
    assert "KL per token, nats" in to_svg(chart)
    history = History()
    history.add({"step": 1, **lines[0]})
    assert not [chart for chart in charts(history, []) if chart.key == "score-divergence"]
