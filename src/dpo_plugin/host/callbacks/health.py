"""Health checks in a run, and what it leaves for its report: log, settings, findings and the report itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dpo_plugin.config import Action
from dpo_plugin.errors import HealthError
from dpo_plugin.health.history import History
from dpo_plugin.health.monitor import HealthCheck, HealthMonitor, in_order
from dpo_plugin.host.callbacks import RunningTrainer
from dpo_plugin.host.log import LOG, may_fail
from dpo_plugin.host.plugin import DPOPlugin
from dpo_plugin.metrics.adapter_norms import whole_size
from dpo_plugin.model.adapters import POLICY, PolicyReferenceModel
from dpo_plugin.registry import get_registry
from dpo_plugin.report.run_folder import AUDIT, RUN, log_text, objects, read_json, read_run
from dpo_plugin.report.run_folder import LOG as LOG_FILE
from dpo_plugin.report.shown import shown_text
from dpo_plugin.types import Finding, RunFacts


class HealthCallback(TrainerCallback):  # type: ignore[misc]
    """Runs the health checks at each logging step and says what they find once; keeps log and findings on disk.

    Args:
        checks: Name → check and its action.
        report: Whether the report is written at the end.

    Raises:
        HealthError: If a check with the action ``stop`` finds something, before the first step or at one.
    """

    def __init__(self, trainer: RunningTrainer, checks: Mapping[str, tuple[HealthCheck, Action]], report: bool):
        self.trainer = trainer
        self.checks = checks
        self.report = report
        self.folder = Path(trainer.args.output_dir)
        self.monitor: HealthMonitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check what is known before the first step, including the lines of a run that is resumed."""
        history = History(run_facts(self.trainer), objects(read_json(self.folder / AUDIT, []).get("datasets")))
        for line in state.log_history:
            history.add(line)
        if self.trainer.is_world_process_zero():
            with may_fail(self.folder / LOG_FILE):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / LOG_FILE).write_text("".join(map(log_text, state.log_history)), encoding="utf-8")
        owner = get_registry().health_checks.owner
        self.monitor = HealthMonitor({name: check for name, (check, _) in self.checks.items()}, history, owner)
        self._write()
        self._act(self.monitor.check())

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the line that was just logged."""
        if self.monitor is not None and state.log_history:
            if self.trainer.is_world_process_zero():
                file = self.folder / LOG_FILE
                with may_fail(file), file.open("a", encoding="utf-8") as log:
                    log.write(log_text(state.log_history[-1]))
            self._act(self.monitor.add(state.log_history[-1]))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the findings and the report."""
        self._finish()

    def _act(self, found: list[Finding]) -> None:
        for finding in found:
            LOG.warning(f"dpo_plugin: {finding.text()}")
        stopping = [finding for finding in found if self.checks[finding.check][1] == "stop"]
        if stopping:
            self._finish()
            raise HealthError(
                f"{stopping[0].text()} (the run stops because `dpo_plugin.health` says `stop` for this check)"
            )

    def _write(self, **more: Any) -> None:
        """Write what the report reads besides the log, on the main rank.

        Findings come at the end: of a run that was killed, the report makes them from the log.
        """
        if self.monitor is None or not self.trainer.is_world_process_zero():
            return
        content = {"facts": asdict(self.monitor.history.facts), "config": DPOPlugin.active().shown, **more}
        with may_fail(self.folder / RUN):
            (self.folder / RUN).write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")

    def _finish(self) -> None:
        """Write the findings and the report; a failure must not cost a run that has ended well."""
        findings = in_order(self.monitor.findings.values()) if self.monitor else []
        self._write(findings=[asdict(one) for one in findings], rewards=self.trainer.recorder.reward_course())
        if not self.report or not self.trainer.is_world_process_zero():
            return
        from dpo_plugin.report.report import write_report

        try:
            LOG.info(f"dpo_plugin: report: {write_report([read_run(self.folder)], self.folder / 'report.html')}")
        except Exception as error:
            LOG.warning(f"dpo_plugin: no report was written: {type(error).__name__}: {error}")


def run_facts(trainer: RunningTrainer) -> RunFacts:
    """Collect what is known of a run before its first step."""
    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    strategy, settings = trainer.reference.strategy, trainer.settings
    lora = model.peft_config[POLICY] if isinstance(model, PolicyReferenceModel) else None
    sizes = [(whole_size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    without = "all weights" if lora is None else "a fresh LoRA"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return RunFacts(
        beta=trainer.args.beta,
        learning_rate=args.learning_rate,
        losses=tuple(trainer.preference_step.losses),
        adapter_dtype=trainer.recorder.trained_dtype(),
        lora_r=getattr(lora, "r", None),
        trainable_share=sum(size for size, trained in sizes if trained) / max(1, sum(size for size, _ in sizes)),
        sequence_len=args.max_length,
        planned_steps=trainer.state.max_steps or None,
        epochs=args.num_train_epochs,
        starts_as_reference=strategy.equals_policy_at_start(),
        reference_fixed=not strategy.moves,
        base=shown_text(str(model.config.name_or_path)),
        policy=shown_text(str(settings.policy.path)) if settings.policy else without,
        reference=shown_text(str(settings.reference)),
        pairs=len(trainer.train_dataset),
        hardware=f"{trainer.accelerator.num_processes} × {device}",
    )
