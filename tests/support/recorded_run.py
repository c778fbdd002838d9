"""An output folder as a run leaves it, with every file that the report reads."""

import json
from dataclasses import asdict
from pathlib import Path

from dpo_plugin.report.run_folder import AUDIT, LOG, RUN, SAMPLES, log_text


def folder(path: Path) -> Path:
    from tests.unit.health.test_health import recorded

    lines, facts, audits = recorded("healthy")
    (path / "checkpoint-4").mkdir(parents=True)
    (path / LOG).write_text("".join(map(log_text, lines)), encoding="utf-8")
    (path / AUDIT).write_text(json.dumps({"datasets": audits}), encoding="utf-8")
    config = {"rl": "dpo", "learning_rate": facts.learning_rate, "dpo_plugin": {"reference": {"strategy": "adapter"}}}
    (path / RUN).write_text(json.dumps({"facts": asdict(facts), "config": config}), encoding="utf-8")
    samples = [
        {"step": step, "prompt": "Q?", "question": "Q?", "policy": "Yes.", "reference": "No.", "margin": 0.5}
        for step in (2, 4)
    ]
    (path / SAMPLES).write_text("".join(json.dumps(row) + "\n" for row in samples), encoding="utf-8")
    state = {"log_history": lines, "max_steps": 66, "num_train_epochs": 2}
    (path / "checkpoint-4/trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    return path
