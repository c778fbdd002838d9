"""The trainer's side of metrics: what is added to a log line, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from dpo_plugin.host.travel import Travel
from dpo_plugin.monitor.metrics import MeanMetrics, PreferenceMetric
from dpo_plugin.monitor.pace import Pace
from dpo_plugin.registry import get_registry


class LogsMetrics:
    """Mixin for the trainer; its ``_means`` and ``_pace`` are updated by each forward."""

    accelerator: Any
    model: Any
    _travel: Travel

    def _set_up_metrics(self, metrics: Mapping[str, PreferenceMetric], starts_as_reference: bool) -> None:
        self._means = {
            mode: MeanMetrics(metrics, get_registry().metrics.owner, starts_as_reference) for mode in ("train", "eval")
        }
        self._pace = Pace()
        self._eval_prefix = "eval"

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Evaluate, with our metrics under the prefix that is asked for."""
        self._eval_prefix = metric_key_prefix
        metrics: dict[str, float] = super().evaluate(  # type: ignore[misc]
            *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our metrics, averaged over all pairs of all ranks since the last line."""
        mode = "train" if self.model.training else "eval"
        prefix = f"{self._eval_prefix}_" if mode == "eval" else ""
        found = self._means[mode].result(self._sum, self.accelerator.gather, self._everyones)
        if mode == "train" and found:
            found |= self.travelled() | self._pace.result(self._sum, self.accelerator.device)
        logs.update({f"{prefix}{name}": value for name, value in found.items()})
        super().log(logs, start_time)  # type: ignore[misc]

    def travelled(self) -> dict[str, float]:
        """How far the trained weights have gone, and how many moved; every rank must call it."""
        return self._travel.figures(self.model, self._sum, self.accelerator.process_index)

    def trained_dtype(self) -> str | None:
        """Dtype in which the optimizer updates most of the weights; known from the first `travelled` on."""
        dtype = self._travel.dtype
        return None if dtype is None else str(dtype).removeprefix("torch.")

    def remember_start(self, lines: Sequence[dict[str, Any]]) -> None:
        """Let a resumed run measure displacement from the log-probs per token that its first line had."""
        names = ("logps/chosen_per_token", "logps/rejected_per_token")
        for mode, prefix in (("train", ""), ("eval", "eval_")):
            start = next((line for line in lines if all(prefix + name in line for name in names)), None)
            if start is not None:
                self._means[mode].start = (start[prefix + names[0]], start[prefix + names[1]])

    def _sum(self, values: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
        return total

    def _everyones(self, value: Any) -> list[Any]:
        return list(gather_object([value]))
