"""Bars on a terminal, short lines everywhere, and nothing from ranks other than the first."""

import io
import sys
from itertools import count
from types import SimpleNamespace

import pytest

from dpo_plugin.host.callbacks.progress import Progress

ARGS = SimpleNamespace(eval_batch_size=2, world_size=2, per_device_train_batch_size=4, gradient_accumulation_steps=16)
LINE = {"loss": 0.5, "speed/pairs_per_second": 2.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(bars=True, first=True, resumed_at=0):
    progress = Progress(bars, clock=map(float, count(0, 90)).__next__)
    state = SimpleNamespace(is_world_process_zero=first, max_steps=4, global_step=resumed_at)
    loader = SimpleNamespace(dataset=range(7))
    progress.on_train_begin(ARGS, state, None, train_dataloader=SimpleNamespace(dataset=range(1280)))
    for state.global_step in range(resumed_at + 1, 5):
        progress.on_step_end(ARGS, state, None)
        progress.on_log(ARGS, state, None, logs=LINE)
    for _ in range(2):
        progress.on_prediction_step(ARGS, state, None, eval_dataloader=loader)
    progress.on_evaluate(ARGS, state, None)
    progress.on_train_end(ARGS, state, None)


def test_bars_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run()
    drawn = sys.stderr.getvalue()
    assert "DPO: 100%" in drawn
    assert "4/4" in drawn
    assert "Held-out pairs:" in drawn
    assert "/7" in drawn
    assert "2 pairs/s" in drawn
    assert capsys.readouterr().out.splitlines()[3] == "step 4/4  loss 0.5000  2 pairs/s"


@pytest.mark.parametrize(("terminal", "bars"), [(io.StringIO, True), (Terminal, False)])
def test_no_bar_without_a_terminal_or_where_none_is_wanted(terminal, bars, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", terminal())
    run(bars)
    assert sys.stderr.getvalue().strip() == ""
    times = ["1 min 30 s, 4 min 30 s left", "3 min 00 s, 3 min 00 s left", "4 min 30 s, 1 min 30 s left"]
    expected = [f"step {step}/4  loss 0.5000  2 pairs/s  {time}" for step, time in enumerate(times, start=1)]
    assert capsys.readouterr().out.splitlines()[:3] == expected


def test_a_resumed_run_counts_its_own_steps(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    run(resumed_at=2)
    assert capsys.readouterr().out.splitlines()[0] == "step 3/4  loss 0.5000  2 pairs/s  1 min 30 s, 1 min 30 s left"


@pytest.mark.parametrize(("at", "resumed"), [(0, ""), (2, ", from step 2")])
def test_the_start_says_how_much_there_is_to_do(at, resumed, monkeypatch):
    said = []
    monkeypatch.setattr("dpo_plugin.host.callbacks.progress.LOG.info", said.append)
    run(resumed_at=at)
    made = "4 micro_batch_size × 16 accumulated × 2 processes"
    assert said == [f"dpo_plugin: 1,280 pairs; 128 pairs a step ({made}); 4 steps{resumed}"]


def test_other_ranks_say_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(first=False)
    assert sys.stderr.getvalue() + capsys.readouterr().out == ""
