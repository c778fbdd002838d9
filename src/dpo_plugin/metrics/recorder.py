"""The trainer's side of metrics: what is added to a log line, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from dpo_plugin.metrics.adapter_norms import AdapterNorms
from dpo_plugin.metrics.aggregates import MetricMeans
from dpo_plugin.metrics.pair import PreferenceMetric
from dpo_plugin.metrics.throughput import Throughput

SHOWN_PAIRS = 500
"""Most pairs whose rewards the report draws."""


class MetricRecorder:
    """Mixin for the trainer; its ``_means`` and ``_throughput`` are updated by each forward."""

    accelerator: Any
    is_in_train: bool
    model: Any
    state: Any
    _adapter_norms: AdapterNorms

    def _set_up_metrics(
        self, metrics: Mapping[str, PreferenceMetric], owner: Callable[[str], str], starts_as_reference: bool
    ) -> None:
        self._means = {mode: MetricMeans(metrics, owner, starts_as_reference) for mode in ("train", "eval")}
        self._throughput = Throughput()
        self._eval_prefix = "eval"
        self._rewards: dict[str, dict[str, tuple[int, Tensor]]] = {}

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
        trained = self.is_in_train or self.state.global_step > 0
        found = self._means[mode].result(self._gather_object, since_start=trained)
        if mode == "train" and found:
            found |= self.adapter_norms() | self._throughput.result(self._sum, self.accelerator.device)
        if found:
            now = self.state.global_step, self._means[mode].rewards
            self._rewards.setdefault(prefix, {"start": now})["end"] = now
        logs.update({f"{prefix}{name}": value for name, value in found.items()})
        super().log(logs, start_time)  # type: ignore[misc]

    def reward_course(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Prefix of the log's fields → ``start`` and ``end`` → the step, and rewards of at most `SHOWN_PAIRS` pairs."""
        return {
            prefix: {when: {"step": step, **_columns(rewards)} for when, (step, rewards) in course.items()}
            for prefix, course in self._rewards.items()
        }

    def adapter_norms(self) -> dict[str, float]:
        """How far the trained weights have gone, and how many moved; every rank must call it."""
        return self._adapter_norms.figures(self.model, self._sum, self.accelerator.process_index)

    def trained_dtype(self) -> str | None:
        """Dtype in which the optimizer updates most of the weights; known from the first `adapter_norms` on."""
        dtype = self._adapter_norms.dtype
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

    def _gather_object(self, value: Any) -> list[Any]:
        return list(gather_object([value]))


def _columns(rewards: Tensor) -> dict[str, list[float]]:
    few = rewards[:: max(1, -(-len(rewards) // SHOWN_PAIRS))].T.tolist()
    return {
        side: [float(f"{value:.4g}") for value in values]
        for side, values in zip(("chosen", "rejected"), few, strict=True)
    }
