"""Samples in whole runs on a tiny model, and ``compare`` on what they leave."""

import json
import sys
from typing import ClassVar

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dpo_plugin.errors import CheckpointError, ConfigError, ScorerError
from dpo_plugin.host.commands.cli import dpo
from dpo_plugin.host.commands.compare import compare
from tests.support import host, tiny
from tests.support.tiny import chat_row, dpo_config, write_rows

ROWS = [
    chat_row(f"Question {n}?", f"Thanks! Good answer {n}.", f"Bad {n}.", "ab"[n % 2]) for n in range(8)
]  # a run of 4 steps sees them twice


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    files = (write_rows(folder / "train.jsonl", ROWS), write_rows(folder / "test.jsonl", ROWS[:5]))
    entries = [[{"path": str(file), "ds_type": "json", "type": "dpo_plugin.chat"}] for file in files]
    return dict(zip(("datasets", "test_datasets"), entries, strict=True))


def config(base_dir, sft_dir, data, output, samples, **settings):
    usual = {"lora_model_dir": str(sft_dir), "num_epochs": 4, "save_strategy": "no", "save_steps": None, **data}
    section = {} if samples is None else {"dpo_plugin": {"samples": samples}}
    return dpo_config(base_dir, output, **{**usual, **section, **settings})


def written(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


SAMPLES = {"every_steps": 3, "max_new_tokens": 8, "count": 2}


class TestTraining:
    @pytest.fixture(scope="class")
    def run(self, base_dir, sft_dir, data, tmp_path_factory):
        folder = tmp_path_factory.mktemp("sampled")
        settings = {"gradient_checkpointing": True, "use_tensorboard": True}
        return host.train(config(base_dir, sft_dir, data, folder / "out", SAMPLES, **settings), folder)

    def test_answers_are_in_the_file_every_so_many_steps_and_at_the_last(self, run):
        lines = written(run.output_dir)
        assert [line["step"] for line in lines] == [3, 3, 4, 4]
        prompts = [line["prompt"] for line in lines]
        assert prompts[:2] == prompts[2:]
        assert prompts[0] != prompts[1]
        asked = {run.trainer.processing_class.decode(row["prompt_ids"]) for row in run.trainer.eval_dataset}
        assert set(prompts) < asked
        assert all(line[side]["tokens"] <= 8 for line in lines for side in ("policy", "reference"))
        assert lines[0]["reference"]["text"] == lines[2]["reference"]["text"]
        assert lines[0]["policy"]["reward"] != lines[2]["policy"]["reward"] != 0

    def test_answers_are_in_tensorboard(self, run):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = {file.parent for file in run.output_dir.rglob("events.out.tfevents*")}
        events = EventAccumulator(str(folder)).Reload().Tensors("samples/text_summary")
        assert [event.step for event in events] == [3, 4]
        assert b"| prompt | reference | policy |" in events[0].tensor_proto.string_val[0]

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_training_is_the_same_with_and_without(self, run, base_dir, sft_dir, data, tmp_path, temperature):
        """Bit by bit: samples change no weight, mode, hook or random number."""
        samples = {**SAMPLES, "every_steps": 1, "temperature": temperature} if temperature else None
        settings = {"gradient_checkpointing": True}
        other = host.train(config(base_dir, sft_dir, data, tmp_path / "out", samples, **settings), tmp_path)
        for ours, theirs in zip(run.lines, other.lines, strict=True):
            assert ours["loss"] == theirs["loss"]
            assert ours["grad_norm"] == theirs["grad_norm"]
        assert (tmp_path / "out" / "samples.jsonl").exists() == (samples is not None)


def test_the_prompts_of_a_file_are_rendered_as_the_data_and_shown(base_dir, sft_dir, data, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Question 1?\nWhy?\n")
    samples = {**SAMPLES, "prompts": str(prompts), "every_steps": 1}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples.jsonl").write_text('{"step": 1, "prompt": "of an earlier run"}\n')
    settings = {"max_steps": 2, "adapter": "qlora", "load_in_4bit": True}
    no_evaluation = {**data, "test_datasets": None}
    run = host.train(config(base_dir, sft_dir, no_evaluation, tmp_path / "out", samples, **settings), tmp_path)
    lines = written(run.output_dir)
    assert [line["step"] for line in lines] == [1, 1, 2, 2]
    row = next(row for row in run.trainer.train_dataset if row["row"] == 2)
    assert lines[0]["prompt"] == run.trainer.processing_class.decode(row["prompt_ids"])
    assert "dpo_plugin: samples at step 2" in capsys.readouterr().out


class TestRefused:
    """Before a model is loaded."""

    @pytest.fixture(autouse=True)
    def no_model_is_loaded(self, monkeypatch):
        from axolotl.loaders.model import ModelLoader

        monkeypatch.setattr(ModelLoader, "load", lambda _: pytest.fail("a model was loaded"))

    @pytest.mark.parametrize(
        ("samples", "settings", "says"),
        [
            ({"prompts": "./none.txt"}, {}, "`dpo_plugin.samples.prompts: ./none.txt` does not exist. Write: prompts:"),
            ({}, {"test_datasets": None}, "takes its prompts from the evaluation data.*Write: val_set_size: 0.05"),
            ({"every_step": 3}, {}, "unknown key `dpo_plugin.samples.every_step`. Known: count, every_steps.*Write"),
            ({"every_steps": 0}, {}, "`dpo_plugin.samples.every_steps`.*found 0"),
            ({}, {"deepspeed": {"zero_optimization": {"stage": 3}}}, "`ZeRO-3`.*axolotl dpo compare"),
            ({}, {"fsdp_config": {"fsdp_version": 2}}, "`FSDP` no rank can run the model alone.*dpo compare"),
            ({}, {"context_parallel_size": 2}, "`context_parallel_size: 2`"),
        ],
    )
    def test_what_cannot_be(self, base_dir, sft_dir, data, tmp_path, samples, settings, says):
        with pytest.raises(ConfigError, match=says):
            host.load_config(config(base_dir, sft_dir, data, tmp_path / "out", samples, **settings), tmp_path)


class TestScorer:
    SAMPLES: ClassVar = {"every_steps": 2, "max_new_tokens": 8, "count": 3, "temperature": 1.0, "scorer": "length"}

    @pytest.fixture(scope="class")
    def run(self, base_dir, sft_dir, data, tmp_path_factory):
        folder = tmp_path_factory.mktemp("scored")
        settings = {
            "eval_steps": 2, "save_steps": 2, "save_strategy": "steps", "logging_steps": 1,
            "metric_for_best_model": "samples/win_rate", "load_best_model_at_end": True, "save_total_limit": 2,
        }  # fmt: skip
        settings["dpo_plugin"] = {"samples": self.SAMPLES, "report": True}
        return host.train(config(base_dir, sft_dir, data, folder / "out", None, **settings), folder)

    def test_scores_and_win_rate_are_logged(self, run):
        lines = written(run.output_dir)
        assert [line["step"] for line in lines] == [2, 2, 2, 4, 4, 4]
        assert all(line[side]["score"] == len(line[side]["text"]) for line in lines for side in ("policy", "reference"))
        for step in (2, 4):
            scores = [(line["policy"]["score"], line["reference"]["score"]) for line in lines if line["step"] == step]
            rate = sum(1 if mine > theirs else 0.5 if mine == theirs else 0 for mine, theirs in scores) / 3
            (logged,) = (line for line in run.lines if line["step"] == step and "loss" in line)
            assert logged["samples/win_rate"] == pytest.approx(rate)
            own = [line["policy"] for line in lines if line["step"] == step]
            kl = sum(answer["reward"] for answer in own) / 0.1 / sum(answer["tokens"] for answer in own)
            assert logged["samples/divergence"] == pytest.approx(kl)
            assert logged["samples/score"] == pytest.approx(sum(mine for mine, _ in scores) / 3)
        assert "Score against divergence" in (run.output_dir / "report.html").read_text()
        assert sum("samples/win_rate" in line for line in run.lines) == 2

    def test_it_chooses_the_best_model(self, run):
        rates = {line["step"]: line["samples/win_rate"] for line in run.lines if "samples/win_rate" in line}
        best = max(rates, key=lambda step: (rates[step], -step))
        assert run.trainer.state.best_metric == pytest.approx(rates[best])
        assert run.trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")

    def test_compare_judges_at_each_temperature(self, run, tmp_path):
        file = run.output_dir.parent / "config.yaml"
        result = CliRunner().invoke(dpo, ["compare", str(file), "--temperature", "0", "--temperature", "0.5", "--json"])
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)["win_rates"]
        assert list(found) == ["1.0", "0.0", "0.5"]
        assert [judged["divergence"] is None for judged in found.values()] == [False, True, True]
        assert all(sum(judged["win_rate"].values()) == 3 for judged in found.values())
        shown = CliRunner().invoke(dpo, ["compare", str(file)])
        assert "Scores" in shown.stdout

    def test_a_scorer_that_cannot_work_is_refused_before_a_model_is_loaded(self, base_dir, sft_dir, data, tmp_path):
        for scorer, says in (("lenght", "Write: dpo_plugin.samples.scorer: length"), ("command", "needs a program")):
            asked = config(base_dir, sft_dir, data, tmp_path / "out", {**SAMPLES, "scorer": scorer})
            with pytest.raises(ConfigError, match=says):
                host.load_config(asked, tmp_path)
        (tmp_path / "prompts.txt").write_text("Why?\n")
        for prompts in ({}, {"prompts": str(tmp_path / "prompts.txt")}):  # without a word of instructions
            asked = config(base_dir, sft_dir, data, tmp_path / "out", {**SAMPLES, "scorer": "rule", **prompts})
            with pytest.raises(ScorerError, match="finds no instructions beside the prompt"):
                host.load_config(asked, tmp_path)
        made = config(base_dir, sft_dir, data, tmp_path / "out", SAMPLES)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(made))
        (tmp_path / "out").mkdir()
        tiny.save_adapter(base_dir, tmp_path / "out")
        with pytest.raises(ConfigError, match="--temperature is for answers that are judged. Write: --scorer rule"):
            compare(tmp_path / "config.yaml", temperatures=[1.0])

    @pytest.mark.parametrize("best", [False, True])
    def test_a_scorer_that_fails_costs_its_scores_and_ends_no_run(
        self, base_dir, sft_dir, data, tmp_path, best, caplog
    ):
        settings = {"eval_steps": 2, "save_steps": 2, "save_strategy": "steps"}
        if best:
            settings |= {"metric_for_best_model": "samples/win_rate", "load_best_model_at_end": True}
        made = config(base_dir, sft_dir, data, tmp_path / "out", {**self.SAMPLES, "scorer": "command"}, **settings)
        made["dpo_plugin"]["pairs"] = {"command": f"{sys.executable} -c exit(3)"}
        if best:  # nothing else chooses
            with pytest.raises(ScorerError, match="exit.3.. ended with 3"):
                host.train(made, tmp_path)
            return
        run = host.train(made, tmp_path)
        assert [line["policy"]["score"] for line in written(run.output_dir)] == [None] * 6
        assert run.trainer.state.global_step == 4
        assert not any("samples/win_rate" in line or "samples/score" in line for line in run.lines)
        assert "training goes on, but these samples have no scores: the scorer" in caplog.text


class TestCompare:
    @pytest.fixture(scope="class")
    def run(self, base_dir, sft_dir, data, tmp_path_factory):
        folder = tmp_path_factory.mktemp("compared")
        settings = {"save_strategy": "steps", "save_steps": 2, "deepspeed": None}
        return host.train(config(base_dir, sft_dir, data, folder / "out", SAMPLES, **settings), folder)

    @pytest.fixture
    def yaml_of(self, run, tmp_path):
        """The run's config with changes."""

        def write(**changes):
            changed = yaml.safe_load((run.output_dir.parent / "config.yaml").read_text()) | changes
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed))
            return tmp_path / "config.yaml"

        return write

    def test_answers_and_figures_are_those_of_the_saved_adapter(self, run, base_dir, sft_dir, yaml_of, monkeypatch):
        from axolotl.loaders.model import ModelLoader

        metrics = run.trainer.evaluate()
        audit = (run.output_dir / "data_audit.json").stat().st_mtime_ns
        loads, load = [], ModelLoader.load
        monkeypatch.setattr(ModelLoader, "load", lambda self: loads.append(1) or load(self))
        section = {"samples": SAMPLES, "loading": "sharded"}
        found = compare(yaml_of(deepspeed={"zero_optimization": {"stage": 3}}, dpo_plugin=section))
        assert len(loads) == 1
        assert found.policy == str(run.output_dir)
        assert found.note is None
        tokenizer = run.trainer.processing_class
        for side, folder in (("policy", run.output_dir), ("reference", sft_dir)):
            alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), str(folder)).eval()
            for sample in found.samples:
                ids = tokenizer(sample.prompt, add_special_tokens=False, return_tensors="pt")
                with torch.no_grad():
                    whole = alone.generate(**ids, do_sample=False, max_new_tokens=8)[0, ids["input_ids"].shape[1] :]
                assert getattr(sample, side).text == tokenizer.decode(whole, skip_special_tokens=True).strip()
        assert found.held_out.margin == pytest.approx(metrics["eval_rewards/margins"], abs=1e-5)
        assert found.held_out.accuracy == pytest.approx(metrics["eval_rewards/accuracies"])
        assert {name: figures.pairs for name, figures in found.by_source.items()} == {"a": 3, "b": 2}
        for name, figures in found.by_source.items():
            assert figures.margin == pytest.approx(metrics[f"eval_rewards/margins/{name}"], abs=1e-5)
        assert (run.output_dir / "data_audit.json").stat().st_mtime_ns == audit
        last = [line for line in written(run.output_dir) if line["step"] == 4]
        assert [line["policy"]["text"] for line in last] == [sample.policy.text for sample in found.samples]
        for line, sample in zip(last, found.samples, strict=True):
            assert line["policy"]["reward"] == pytest.approx(sample.policy.reward, abs=1e-4)

    def test_json_stands_alone_and_a_checkpoint_can_be_named(self, run, yaml_of, tmp_path):
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
        words = ["compare", str(yaml_of()), "--json", "--prompts", str(tmp_path / "prompts.jsonl")]
        found = []
        for more in ([], ["--checkpoint", str(run.output_dir / "checkpoint-2")]):
            result = CliRunner().invoke(dpo, [*words, *more])
            assert result.exit_code == 0, result.output
            found.append(json.loads(result.stdout))
        (sample,) = found[0]["samples"]
        assert "Why?" in sample["prompt"]
        assert found[0]["held_out"]["pairs"] == 5
        assert found[1]["policy"].endswith("checkpoint-2")
        assert found[1]["held_out"]["margin"] < found[0]["held_out"]["margin"]

    def test_what_is_printed(self, run, yaml_of):
        result = CliRunner().invoke(
            dpo, ["compare", str(yaml_of(test_datasets=None, dpo_plugin={}, val_set_size=0.25))]
        )
        assert result.exit_code == 0, result.output
        assert f"policy: {run.output_dir}" in result.stdout
        assert "[reward " in result.stdout
        assert "│ all " in result.stdout

    def test_another_reference_than_in_training_is_said(self, run, yaml_of):
        file = yaml_of(dpo_plugin={"reference": {"strategy": "base"}, "samples": SAMPLES})
        found = compare(file, checkpoint=str(run.output_dir / "checkpoint-4"))
        assert found.reference.startswith("base ")
        assert found.note == (
            f"note: the policy was trained against another reference: {' '.join(run.trainer.origin.reference.values())}"
        )
        assert found.parts()[2] == found.note

    @pytest.mark.parametrize(
        ("changes", "options", "says"),
        [
            ({"output_dir": "./nowhere"}, {}, "`output_dir: ./nowhere` holds no adapter_config.json. Train first, or"),
            ({}, {"checkpoint": "./nowhere"}, "`--checkpoint ./nowhere` holds no adapter_config.json.*--checkpoint <"),
            ({}, {"prompts": "./none.txt"}, "`--prompts ./none.txt` does not exist. Write: --prompts <an existing file>"),
            ({"test_datasets": None}, {}, "takes its prompts from the evaluation data"),
            ({"plugins": []}, {}, r"does not use dpo_plugin. Write: plugins: \[dpo_plugin.DPOPlugin\]"),
        ],
    )  # fmt: skip
    def test_bad_input_is_refused_before_a_model_is_loaded(self, yaml_of, monkeypatch, changes, options, says):
        from axolotl.loaders.model import ModelLoader

        monkeypatch.setattr(ModelLoader, "load", lambda _: pytest.fail("a model was loaded"))
        with pytest.raises(ConfigError, match=says):
            compare(yaml_of(**changes), **options)


def test_compare_needs_the_reference_of_the_checkpoint_where_it_moves(base_dir, sft_dir, data, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    section = {"reference": {"strategy": "ema", "ema_steps": 1}, "samples": SAMPLES}
    run = host.train(config(base_dir, sft_dir, data, tmp_path / "out", None, dpo_plugin=section, **settings), tmp_path)
    metrics = run.trainer.evaluate()
    with pytest.raises(
        CheckpointError, match=r"does not hold it \(reference_state.*Write: --checkpoint .*checkpoint-<"
    ):
        compare(tmp_path / "config.yaml")
    found = compare(tmp_path / "config.yaml", checkpoint=str(run.output_dir / "checkpoint-2"))
    assert found.held_out.margin == pytest.approx(metrics["eval_rewards/margins"], abs=1e-5)


def test_compare_after_full_fine_tuning(base_dir, sft_dir, data, tmp_path):
    settings = {"adapter": None, "lora_model_dir": None, "learning_rate": 1e-4, "max_steps": 2}
    run = host.train(config(base_dir, sft_dir, data, tmp_path / "out", SAMPLES, **settings), tmp_path)
    metrics = run.trainer.evaluate()
    found = compare(tmp_path / "config.yaml")
    assert found.held_out.margin == pytest.approx(metrics["eval_rewards/margins"], abs=1e-5)
    assert found.samples[0].reference.reward < found.samples[0].policy.reward
