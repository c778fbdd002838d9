"""Health checks and figures by source in whole runs."""

import json
import logging

import pytest

from dpo_plugin import hookimpl, registry
from dpo_plugin.errors import HealthError
from dpo_plugin.metrics.pair import needs
from tests.support import host
from tests.support.tiny import chat_row, dpo_config, write_rows

ROWS = [chat_row(f"Question {n}?", f"A good answer, number {n}.", f"Bad {n}.", "ab"[n % 2]) for n in range(40)]


def config(base_dir, sft_dir, tmp_path, **settings):
    data = [{"path": str(write_rows(tmp_path / "rows.jsonl", ROWS)), "ds_type": "json", "type": "dpo_plugin.chat"}]
    usual = {
        "datasets": data,
        "lora_model_dir": str(sft_dir),
        "save_strategy": "no",
        "save_steps": None,
        "max_steps": 10,
    }
    return dpo_config(base_dir, tmp_path / "out", **{**usual, **settings})


def written(run):
    return json.loads((run.output_dir / "dpo_run.json").read_text())


def test_a_run_that_learns_has_no_finding_and_figures_by_source(base_dir, sft_dir, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("COMET_API_KEY", "")  # which the host sets from the config
    secrets = {"comet_api_key": "hush-1", "mlflow_tracking_uri": "http://me:hush-2@mlflow.example"}
    with caplog.at_level(logging.WARNING):
        settings = config(base_dir, sft_dir, tmp_path, **secrets, dpo_plugin={"report": True})
        run = host.train(settings, tmp_path)
    left = [file for file in run.output_dir.rglob("*") if file.is_file() and file.name != "debug.log"]  # the host's
    assert not [file for file in left if b"hush-" in file.read_bytes()]
    assert written(run)["config"]["learning_rate"] == 1e-3
    assert set(written(run)["config"]) <= set(settings), "a default of the host was not set"
    assert written(run)["findings"] == []
    assert written(run)["facts"]["adapter_dtype"] == "float32"
    assert written(run)["facts"]["starts_as_reference"] is True
    facts = [written(run)["facts"][name] for name in ("base", "policy", "reference", "pairs")]
    assert facts == [str(base_dir), str(sft_dir), f"adapter {sft_dir}", 40]
    assert written(run)["facts"]["hardware"].startswith("1 × ")
    assert "health:" not in caplog.text
    page = (run.output_dir / "report.html").read_text()
    assert "Nothing was found that speaks against this run." in page
    assert 'id="rewards-end"' in page
    logged = [json.loads(line) for line in (run.output_dir / "dpo_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == list(range(1, 11))
    line = next(line for line in run.lines if "rewards/margins/a" in line)
    both = [line[f"rewards/margins/{source}"] * line[f"rewards/count/{source}"] for source in "ab"]
    assert sum(both) / 4 == pytest.approx(line["rewards/margins"], abs=1e-5)
    assert 0.3 < line["speed/shared_tokens"] < 0.5
    assert line["speed/reference_cache_hits"] == 0
    assert 0 < line["entropy/chosen"] < 9
    assert line["speed/pairs_per_second"] > 0


def test_no_file_of_ours_tells_a_secret_or_who_lives_here(base_dir, sft_dir, tmp_path, monkeypatch):
    """The adapter's folder is what people upload; the paths in it begin with ~, and no key of a hub or tracker is there."""
    monkeypatch.setenv("COMET_API_KEY", "")  # which the host sets from the config
    monkeypatch.setenv("HF_TOKEN", "hush-0")
    home = tmp_path / "home/jane-doe"
    (home / "models").mkdir(parents=True)
    base, sft = home / "models/base", home / "models/sft"
    base.symlink_to(base_dir)
    sft.symlink_to(sft_dir)
    monkeypatch.setenv("HOME", str(home))
    secrets = {
        "hub_token": "hush-1",
        "wandb_run_id": "hush-2",
        "wandb_entity": "hush-3",
        "comet_api_key": "hush-4",
        "mlflow_tracking_uri": "http://me:hush-5@mlflow.example",
        "val_set_size": 0.1,
        "dpo_plugin": {"report": True, "samples": {"count": 1, "max_new_tokens": 2}},
    }
    settings = config(base, sft, home, **secrets, max_steps=2) | {"save_strategy": "steps", "save_steps": 1}
    out = host.train(settings, home).output_dir
    theirs = ("adapter_config.json", "training_args.bin", "debug.log")  # PEFT's, which it needs, and the host's
    left = [file for file in out.rglob("*") if file.is_file() and file.name not in theirs]
    assert {"README.md", "dpo_run.json", "dpo_plugin.json", "data_audit.json", "report.html"} <= {
        one.name for one in left
    }
    assert not [file for file in left if b"hush-" in file.read_bytes()]
    of_peft = list(out.glob("checkpoint-*/README.md"))
    telling = [file.relative_to(out) for file in left if b"jane-doe" in file.read_bytes() and file not in of_peft]
    assert not telling
    assert "~/models/sft" in (out / "README.md").read_text(encoding="utf-8")
    assert "~/rows.jsonl" in (out / "data_audit.json").read_text(encoding="utf-8")


def test_what_a_third_partys_metric_needs_is_computed_whatever_its_name(base_dir, sft_dir, tmp_path, monkeypatch):
    class TheirPackage:
        @hookimpl
        def dpo_metrics(self):
            return {"mine/certainty": needs("entropy")(lambda logps: -logps.chosen_entropy)}

    manager = registry.build_manager()
    manager.register(TheirPackage(), name="their-package")
    monkeypatch.setattr("dpo_plugin.host.settings.get_registry", lambda: registry.build_registry(manager))
    settings = {"dpo_plugin": {"metrics": ["mine/certainty"]}, "max_steps": 2}
    run = host.train(config(base_dir, sft_dir, tmp_path, **settings), tmp_path)
    assert -9 < run.lines[-1]["mine/certainty"] < 0
    assert "entropy/chosen" not in run.lines[-1]


def test_a_run_that_does_not_learn_is_told_what_to_change(base_dir, sft_dir, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = host.train(config(base_dir, sft_dir, tmp_path, learning_rate=1e-9), tmp_path)
    found = {finding["check"]: finding for finding in written(run)["findings"]}
    assert "loss_at_ln2" in found
    assert found["loss_at_ln2"]["advice"].endswith("Write: learning_rate: 1e-05")
    assert caplog.text.count("health: loss_at_ln2 (error") == 1


def test_a_check_can_stop_the_run_or_be_off(base_dir, sft_dir, tmp_path):
    settings = config(base_dir, sft_dir, tmp_path, learning_rate=1e-9)
    with pytest.raises(HealthError, match=r"the loss stays at ln 2.*`dpo_plugin.health` says `stop`"):
        host.train({**settings, "dpo_plugin": {"health": {"checks": {"loss_at_ln2": "stop"}}}}, tmp_path)
    assert json.loads((tmp_path / "out/dpo_run.json").read_text())["findings"]
    run = host.train({**settings, "dpo_plugin": {"health": {"action": "off"}}}, tmp_path)
    assert written(run)["findings"] == []


def test_a_full_fine_tuning_whose_updates_bf16_rounds_away_is_told_so(base_dir, tmp_path, monkeypatch):
    for module in ("training_args", "utils.import_utils"):  # a CPU computes in bf16 as well
        monkeypatch.setattr(f"transformers.{module}.is_torch_bf16_gpu_available", lambda: True)
    settings = {"adapter": None, "lora_model_dir": None, "bf16": True, "learning_rate": 5e-7, "max_steps": 12}
    settings["dpo_plugin"] = {"compute": {"master_weights": False}}
    run = host.train(config(base_dir, None, tmp_path, **settings), tmp_path)
    found = {finding["check"]: finding for finding in written(run)["findings"]}
    assert found["learning_rate_below_precision"]["numbers"]["weights/changed"] < 0.1
    assert found["learning_rate_below_precision"]["advice"].endswith("{compute: {master_weights: true}}")
    assert written(run)["facts"]["adapter_dtype"] == "bfloat16"
    assert written(run)["facts"]["trainable_share"] == 1


def test_the_log_of_a_resumed_run_has_each_step_once(base_dir, sft_dir, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    out = host.train(config(base_dir, sft_dir, tmp_path, **saves), tmp_path).output_dir
    with (out / "dpo_log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')  # killed while it wrote
    resumed = config(base_dir, sft_dir, tmp_path, **saves, resume_from_checkpoint=str(out / "checkpoint-2"))
    host.train(resumed, tmp_path)
    logged = [json.loads(line) for line in (out / "dpo_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3, 4]
