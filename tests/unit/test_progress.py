"""Bars on a terminal, short lines everywhere, and nothing from ranks other than the first."""

import io
import sys
from types import SimpleNamespace

import pytest

from dpo_plugin.host.progress import Progress

ARGS = SimpleNamespace(eval_batch_size=2, world_size=2)
LINE = {"loss": 0.5, "speed/pairs_per_second": 2.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(bars=True, first=True):
    progress = Progress(bars)
    state = SimpleNamespace(is_world_process_zero=first, max_steps=4, global_step=0)
    loader = SimpleNamespace(dataset=range(7))
    progress.on_train_begin(ARGS, state, None)
    for state.global_step in range(1, 5):
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
    assert "step 4/4  loss 0.5000  2 pairs/s" in capsys.readouterr().out


@pytest.mark.parametrize(("terminal", "bars"), [(io.StringIO, True), (Terminal, False)])
def test_no_bar_without_a_terminal_or_where_none_is_wanted(terminal, bars, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", terminal())
    run(bars)
    assert sys.stderr.getvalue().strip() == ""
    assert capsys.readouterr().out.splitlines() == [f"step {step}/4  loss 0.5000  2 pairs/s" for step in range(1, 5)]


def test_other_ranks_say_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(first=False)
    assert sys.stderr.getvalue() + capsys.readouterr().out == ""
