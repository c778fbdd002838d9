"""What a person sees while a run goes on: bars with pairs per second and time left, and one short line per log step."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback

from dpo_plugin.monitor.summary import summary


class Progress(ProgressCallback):  # type: ignore[misc]
    """Takes the place of the host's bar, which prints every field of every line.

    Bars are drawn on a terminal alone; the short lines are printed in any case. All fields are in dpo_log.jsonl, the
    report and the trackers.

    Args:
        bars: Whether bars are wanted at all; the host's ``disable_tqdm``.
    """

    def __init__(self, bars: bool = True):
        super().__init__()
        self.training_bar: Any
        self.prediction_bar: Any
        self._disable = None if bars else True  # None: where the output is no terminal

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the bar of the run."""
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, desc="DPO", unit="step", **self._looks())
        self.current_step = 0

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Draw the bar of an evaluation, in pairs."""
        if not state.is_world_process_zero or eval_dataloader is None:
            return
        if self.prediction_bar is None:
            pairs, leave = len(eval_dataloader.dataset), self.training_bar is None
            self.prediction_bar = tqdm(total=pairs, desc="Held-out pairs", unit="pair", leave=leave, **self._looks())
        bar = self.prediction_bar
        bar.update(min(args.eval_batch_size * args.world_size, bar.total - bar.n))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Print the short line."""
        if not state.is_world_process_zero:
            return
        if self.training_bar is not None and (pace := logs.get("speed/pairs_per_second")):
            self.training_bar.set_postfix_str(f"{pace:.3g} pairs/s", refresh=False)
        if text := summary(logs, state.global_step, state.max_steps):
            tqdm.write(text)

    def _looks(self) -> dict[str, Any]:
        return {"dynamic_ncols": True, "disable": self._disable}
