"""Reference strategies and their kept log-probs in whole runs."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dpo_plugin.errors import AdapterError, ConfigError
from dpo_plugin.host.log import LOG
from dpo_plugin.model.adapters import POLICY, REFERENCE, adapter_tensors
from dpo_plugin.model.cache import _SAMPLE, _SAMPLES, weights_digest
from tests.support import forked, host
from tests.support.tiny import chat_row, dpo_config, save_adapter, save_base, write_rows

ROWS = [chat_row(f"Question {n}?", f"Good answer {n}.", f"Bad {n}.", "s") for n in range(8)]


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def said(monkeypatch):
    """What the run warns of."""
    lines = []
    monkeypatch.setattr(LOG, "warning", lines.append)
    return lines


def config(base_dir, sft_dir, rows, tmp_path, output="out", **settings):
    data = [{"path": str(rows), "ds_type": "json", "type": "dpo_plugin.chat"}]
    usual = {
        "datasets": data,
        "lora_model_dir": str(sft_dir),
        "max_steps": 2,
        "save_strategy": "no",
        "save_steps": None,
    }
    return dpo_config(base_dir, tmp_path / output, **{**usual, **settings})


def reference(**section):
    return {"dpo_plugin": {"reference": section}}


@pytest.mark.core
class TestStrategies:
    @pytest.mark.parametrize("settings", [{}, {"adapter": "qlora", "load_in_4bit": True}], ids=["fp32", "nf4"])
    @pytest.mark.parametrize("strategy", ["adapter", "ema"])
    def test_rewards_are_0_at_step_0_where_policy_is_reference(
        self, base_dir, sft_dir, rows, tmp_path, strategy, settings
    ):
        run = host.train(
            config(base_dir, sft_dir, rows, tmp_path, **reference(strategy=strategy), **settings), tmp_path
        )
        bound = 0 if not settings else 1e-4
        assert abs(run.lines[0]["rewards/chosen"]) <= bound
        assert abs(run.lines[0]["rewards/rejected"]) <= bound

    def test_rewards_are_0_at_step_0_for_a_fresh_lora_on_nf4(self, base_dir, sft_dir, rows, tmp_path):
        settings = {"lora_model_dir": None, "adapter": "qlora", "load_in_4bit": True}
        run = host.train(config(base_dir, sft_dir, rows, tmp_path, **settings), tmp_path)
        assert run.trainer.reference.strategy.equals_policy_at_start()
        assert abs(run.lines[0]["rewards/chosen"]) <= 1e-4
        assert run.lines[1]["rewards/chosen"] != 0

    def test_base_of_a_fresh_lora_is_0_and_of_an_sft_adapter_is_not(self, base_dir, sft_dir, rows, tmp_path):
        fresh = host.train(config(base_dir, sft_dir, rows, tmp_path, lora_model_dir=None), tmp_path / "a")
        assert fresh.lines[0]["rewards/chosen"] == 0
        asked = host.train(config(base_dir, sft_dir, rows, tmp_path, **reference(strategy="base")), tmp_path / "b")
        assert asked.lines[0]["rewards/chosen"] != 0

    def test_a_second_model_for_full_fine_tuning(self, base_dir, rows, tmp_path):
        keys = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_model_dir", "adapter")
        settings = {**dict.fromkeys(keys), "learning_rate": 1e-4}
        run = host.train(config(base_dir, None, rows, tmp_path, **settings), tmp_path)
        assert run.lines[0]["rewards/chosen"] == 0
        assert run.lines[1]["rewards/margins"] != 0
        assert run.trainer.ref_model is not None
        assert (
            not any(p.requires_grad for p in run.trainer.ref_model.parameters())
            or run.trainer.ref_model is not run.trainer.model
        )
        assert (run.output_dir / "model.safetensors").is_file()

    def test_none_is_reference_free(self, base_dir, sft_dir, rows, tmp_path):
        run = host.train(config(base_dir, sft_dir, rows, tmp_path, **reference(strategy="none")), tmp_path)
        line = run.lines[0]
        assert line["rewards/chosen"] == pytest.approx(0.1 * line["logps/chosen"], rel=1e-5)

    def test_ema_moves_the_reference_by_its_share(self, base_dir, sft_dir, rows, tmp_path):
        section = reference(strategy="ema", ema_alpha=0.25, ema_steps=2)
        run = host.train(config(base_dir, sft_dir, rows, tmp_path, **section), tmp_path)
        start = load_file(sft_dir / "adapter_model.safetensors")
        moved, policy = (adapter_tensors(run.trainer.model, name) for name in (REFERENCE, POLICY))
        for key, value in start.items():
            torch.testing.assert_close(moved[key], 0.75 * value + 0.25 * policy[key])
        assert any(not torch.equal(moved[key], start[key]) for key in start)

    def test_ema_cannot_keep_log_probs(self, base_dir, sft_dir, rows, tmp_path):
        with pytest.raises(ConfigError, match=r"'?ema.*Write: cache: false"):
            host.load_config(
                config(base_dir, sft_dir, rows, tmp_path, **reference(strategy="ema", cache=True)), tmp_path
            )


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_loss_and_leaks_no_hook(base_dir, sft_dir, rows, tmp_path, reentrant):
    """TRL 1.9 toggles checkpointing twice a step and leaks a hook each time; the reference runs under it as it is."""

    def hooks(model):
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    settings = {**reference(cache=False), "max_steps": 6}
    plain = host.train(config(base_dir, sft_dir, rows, tmp_path, "plain", **settings), tmp_path / "a")
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    counts = []
    for steps in (1, 6):
        settings["max_steps"] = steps
        run = host.train(
            config(base_dir, sft_dir, rows, tmp_path, f"c{steps}", **settings, **checkpointing), tmp_path / f"c{steps}"
        )
        counts.append(hooks(run.trainer.model))
    assert counts[0] == counts[1]
    assert run.trainer.model.is_gradient_checkpointing
    for one, other in zip(plain.lines, run.lines, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)


def counted(run):
    return run.trainer.reference.forwards


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def scale_unsampled_weights(folder, factor=1.05):
    """Change what `weights_digest` does not read: 38 % of the values of this model."""
    before, file = weights_digest(folder), folder / "model.safetensors"
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")  # of the values, after safetensors' header
    values = torch.frombuffer(bytearray(content[begin:]), dtype=torch.float32)
    seen = torch.zeros(len(content), dtype=torch.bool)
    for index in range(_SAMPLES):
        seen[index * (len(content) - _SAMPLE) // (_SAMPLES - 1) :][:_SAMPLE] = True
    unseen = ~seen[begin:].reshape(-1, 4).any(1)
    assert 0.3 < unseen.float().mean() < 0.5
    file.write_bytes(content[:begin] + torch.where(unseen, values * factor, values).numpy().tobytes())
    assert weights_digest(folder) == before
    return folder


class TestKeptLogProbs:
    @pytest.fixture(scope="class")
    def filled(self, base_dir, sft_dir, tmp_path_factory):
        """A run of two epochs, and what it kept."""
        folder = tmp_path_factory.mktemp("first")
        settings = {**reference(cache=str(folder / "kept")), "max_steps": 4}
        run = host.train(config(base_dir, sft_dir, write_rows(folder / "rows.jsonl", ROWS), folder, **settings), folder)
        return run, folder / "kept"

    @pytest.fixture
    def kept(self, filled, tmp_path):
        return shutil.copytree(filled[1], tmp_path / "kept")

    def test_a_second_run_with_other_settings_runs_the_reference_never(
        self, base_dir, sft_dir, rows, tmp_path, filled, kept
    ):
        common = {**reference(cache=str(kept)), "max_steps": 4}
        first, _ = filled
        assert counted(first) == 2  # the first epoch; the second reads
        same = host.train(config(base_dir, sft_dir, rows, tmp_path, "again", **common), tmp_path / "b")
        assert counted(same) == 0
        for one, other in zip(first.lines, same.lines, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        changed = {"learning_rate": 3e-4, "rl_beta": 0.3, "dpo_loss_type": ["ipo"], "seed": 7}
        other = host.train(config(base_dir, sft_dir, rows, tmp_path, "other", **common, **changed), tmp_path / "c")
        assert counted(other) == 0

    @pytest.mark.parametrize(
        "change", ["row", "adapter", "alpha", "base", "weights", "rope", "length", "quantisation", "template"]
    )
    def test_what_the_reference_says_changes_is_computed_again(
        self, base_dir, sft_dir, rows, tmp_path, kept, change, said
    ):
        settings = reference(cache=str(kept))
        if change == "row":
            rows = write_rows(rows, [*ROWS[:7], chat_row("Question 7?", "Other answer.", "Bad 7.", "s")])
        if change == "adapter":
            sft_dir = save_adapter(base_dir, tmp_path / "sft2", seed=9)
        if change == "alpha":
            sft_dir = edit_config(shutil.copytree(sft_dir, tmp_path / "sft2"), lora_alpha=18)
            settings["lora_alpha"] = 18
        if change == "base":
            base_dir = save_base(tmp_path / "base2", seed=3)
        if change == "weights":
            base_dir = scale_unsampled_weights(shutil.copytree(base_dir, tmp_path / "base2"))
        if change == "rope":
            rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
            settings["overrides_of_model_config"] = {"rope_parameters": rope}
        if change == "length":
            settings |= {"sequence_len": 63, "excess_length_strategy": "truncate"}
        if change == "quantisation":
            settings |= {"adapter": "qlora", "load_in_4bit": True}
        if change == "template":
            settings |= {"chat_template": "chatml"}
        again = host.train(config(base_dir, sft_dir, rows, tmp_path, "again", **settings), tmp_path / "b")
        assert [line["loss"] for line in again.lines][:1] == pytest.approx([0.693147], abs=1e-5)
        assert counted(again) > 0
        if change == "weights":
            assert len([line for line in said if "are not those of this reference" in line]) == 1

    def test_rotary_frequencies_that_depend_on_other_rows_are_said_once_and_nothing_is_kept(
        self, base_dir, sft_dir, rows, tmp_path, said
    ):
        factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "original_max_position_embeddings": 24}
        rope = {"rope_type": "longrope", "factor": 2.0, "rope_theta": 10000.0, **factors}
        section = reference(cache=str(tmp_path / "kept"))
        settings = {**section, "overrides_of_model_config": {"rope_parameters": rope}}
        run = host.train(config(base_dir, sft_dir, rows, tmp_path, **settings), tmp_path)
        assert run.trainer.reference.cache is None
        assert len([line for line in said if "depend on the longest row" in line]) == 1
        assert not list(tmp_path.rglob("*.logps"))

    def test_precompute_fills_the_store_before_step_1(self, base_dir, sft_dir, rows, tmp_path, monkeypatch):
        """TRL would hash every weight of the base for a cache of its own, 1.16 as soon as its trainer is made."""
        monkeypatch.setattr("trl.trainer.dpo_trainer.hash_module", lambda _: pytest.fail("the base is hashed"))
        common = {**reference(cache=str(tmp_path / "kept")), "max_steps": 2}
        plain = host.train(config(base_dir, sft_dir, rows, tmp_path, **reference(cache=False)), tmp_path / "a")
        assert plain.trainer.reference.cache is None
        filled = host.train(
            config(base_dir, sft_dir, rows, tmp_path, "b", precompute_ref_log_probs=True, **common), tmp_path / "b"
        )
        assert len(filled.trainer.reference.cache) == len(ROWS)
        for one, other in zip(plain.lines, filled.lines, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        again = host.train(
            config(base_dir, sft_dir, rows, tmp_path, "c", precompute_ref_log_probs=True, **common), tmp_path / "c"
        )
        assert counted(again) == 0

    def test_two_processes_at_once_say_what_one_says(self, base_dir, sft_dir, rows, tmp_path):
        alone = host.train(config(base_dir, sft_dir, rows, tmp_path, **reference(cache=False)), tmp_path / "alone")
        jobs = []
        for name in ("a", "b"):
            file = tmp_path / f"{name}.yaml"
            settings = config(base_dir, sft_dir, rows, tmp_path, name, **reference(cache=str(tmp_path / "kept")))
            file.write_text(yaml.safe_dump({**settings, "save_strategy": "steps", "save_steps": 2}))
            command = [sys.executable, "-m", "axolotl.cli.train", str(file)]
            jobs.append(forked.start(command))
        assert [job.end().returncode for job in jobs] == [0, 0]
        expected = [line["loss"] for line in alone.lines]
        for name in ("a", "b"):
            state = json.loads((tmp_path / name / "checkpoint-2/trainer_state.json").read_text())
            assert [line["loss"] for line in state["log_history"] if "loss" in line] == pytest.approx(
                expected, abs=1e-6
            )
        after = host.train(
            config(base_dir, sft_dir, rows, tmp_path, "c", **reference(cache=str(tmp_path / "kept"))), tmp_path / "c"
        )
        assert counted(after) == 0

    def test_a_folder_that_cannot_be_written_stops_nothing(self, base_dir, sft_dir, rows, tmp_path):
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache/reference_logps").write_text("")
        run = host.train(
            config(base_dir, sft_dir, rows, tmp_path, **reference(cache=str(tmp_path / "cache"))), tmp_path
        )
        assert len(run.lines) == 2
        assert run.trainer.reference.cache.failure


def test_a_truncated_adapter_file_is_refused(base_dir, sft_dir, rows, tmp_path):
    cut = shutil.copytree(sft_dir, tmp_path / "cut")
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="damaged or cut off"):
        host.load_config(config(base_dir, cut, rows, tmp_path), tmp_path)
