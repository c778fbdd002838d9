"""An axolotl plugin, for tests alone: one rank dies in the middle of a step, as a machine does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

from tests.support.cpu_ranks import records


class DyingRank(BasePlugin):
    """Kills rank 1 at the step that the environment names, and leaves the time of it in the run's records."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [_Kill()]


class _Kill(TrainerCallback):
    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Between two micro-steps of one step: gradients are half gathered."""
        if os.environ.get("RANK") == "1" and state.global_step == int(os.environ["DIE_AT_STEP"]):
            time_of_death(args.output_dir).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


def time_of_death(output_dir: str | Path) -> Path:
    """The file that holds it, in seconds since the epoch."""
    return records(output_dir) / "died"
