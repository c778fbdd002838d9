"""What a run does with the layout of its batches: it compares, says what it found, and takes two rows where they differ."""

import math

import pytest
from transformers import AutoModelForCausalLM

from dpo_plugin.compute import attention
from dpo_plugin.errors import ConfigError
from dpo_plugin.host import batches
from tests.support import host, tiny
from tests.support.architectures import make_config
from tests.support.tiny import dpo_config
from tests.unit.compute.test_layouts import hidden_prefix, window_off_by_one

WINDOW = 64
LONG = tiny.chat_row("How long? " * 24, "As long as it takes, and longer still.", "Short.")


@pytest.fixture(scope="module")
def windowed_dir(tmp_path_factory):
    """A Mistral whose window is shorter than the rows, with an SFT adapter beside it."""
    return save("mistral", tmp_path_factory.mktemp("mistral"), sliding_window=WINDOW)


def save(kind, folder, **settings):
    ids = {"eos_token_id": tiny.tokenizer().eos_token_id, "pad_token_id": tiny.tokenizer().pad_token_id}
    config = make_config(kind, vocab_size=len(tiny.tokenizer()), bos_token_id=None, **ids, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    tiny.save_adapter(folder, folder / "sft", target_modules="all-linear")
    return folder


@pytest.fixture
def config(tmp_path):
    def write(base_dir, **settings):
        lora = {"lora_model_dir": str(base_dir / "sft"), "lora_target_modules": None, "lora_target_linear": True}
        return dpo_config(
            base_dir,
            tmp_path / "out",
            **{**lora, "max_steps": 2, "save_strategy": "no", "save_steps": None, **settings},
        )

    return write


def said(log):
    return [line for line in log if "chosen and rejected" in line]


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr(batches.LOG, "info", lines.append)
    return lines


def test_a_sliding_window_shares_prefixes_and_changes_nothing(windowed_dir, config, tmp_path, log):
    flat = host.train(config(windowed_dir), tmp_path / "a")
    assert flat.trainer.data_collator.flat
    assert flat.trainer.compared.why_not is None
    assert "share their prefix; it moves log-probs by" in said(log)[0]
    rows = host.train(config(windowed_dir, dpo_plugin={"compute": {"prefix_sharing": False}}), tmp_path / "b")
    assert not rows.trainer.data_collator.flat
    assert flat.lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for one, other in zip(flat.lines, rows.lines, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["logps/chosen"] == pytest.approx(other["logps/chosen"], abs=1e-3)


def keywords_that_are_refused(monkeypatch):
    """As a model of one's own code may do whose forward takes none but its own."""

    def refuse(*_):
        raise TypeError("forward() got an unexpected keyword argument 'pair_segments'")

    monkeypatch.setattr(attention, "_pair_by_pair", refuse)


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (window_off_by_one, "see"),
        (hidden_prefix, "log-probs differ by"),
        (keywords_that_are_refused, "does not run a flat row (TypeError: forward() got an unexpected keyword"),
    ],
)
def test_a_run_takes_two_rows_where_a_flat_one_is_wrong(windowed_dir, config, tmp_path, log, plant, found, monkeypatch):
    plant(monkeypatch)
    run = host.train(config(windowed_dir), tmp_path)
    assert not run.trainer.data_collator.flat
    assert found in said(log)[0]
    assert "two rows each" in said(log)[0]
    assert run.trainer.model.config._attn_implementation == "sdpa"
    assert run.lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_one_who_insists_is_told_the_number(windowed_dir, config, tmp_path, monkeypatch):
    hidden_prefix(monkeypatch)
    with pytest.raises(ConfigError, match=r"log-probs differ by [\d.e+]+ nats over .*Write: auto"):
        host.train(config(windowed_dir, dpo_plugin={"compute": {"prefix_sharing": True}}), tmp_path)


def test_a_model_with_state_is_refused_to_one_who_insists_and_trained_in_rows(config, tmp_path, log):
    base_dir = save("lfm2", tmp_path / "base")
    with pytest.raises(ConfigError, match=r"layers of the model \(conv\) hand on a state.*Write: auto"):
        host.train(config(base_dir, dpo_plugin={"compute": {"prefix_sharing": True}}), tmp_path / "a")
    run = host.train(config(base_dir), tmp_path / "b")
    assert run.lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert "two rows each, because layers of the model (conv) hand on a state" in said(log)[0]


def test_the_routers_loss_is_added_for_the_policy_alone(config, tmp_path):
    base_dir = tiny.save_moe("qwen3_moe", tmp_path / "base")
    tiny.save_adapter(base_dir, base_dir / "sft", target_modules=["q_proj", "v_proj"])
    lora = {"lora_target_linear": None, "lora_target_modules": ["q_proj", "v_proj"]}
    with_it = {"dpo_plugin": {"loss": {"router_aux_loss_coef": 0.5}}}
    plain, routed = (host.train(config(base_dir, **lora, **s), tmp_path / str(n)) for n, s in enumerate(({}, with_it)))
    assert plain.lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert routed.lines[0]["loss"] > math.log(2) + 0.5, "the least that a balanced router has is its number of choices"
    assert routed.lines[0]["rewards/margins"] == 0


def test_a_model_without_routers_has_no_loss_of_them(windowed_dir, config, tmp_path):
    with pytest.raises(
        ConfigError, match=r"router_aux_loss_coef: 0.5.*mistral does not.*Write: router_aux_loss_coef: null"
    ):
        host.train(config(windowed_dir, dpo_plugin={"loss": {"router_aux_loss_coef": 0.5}}), tmp_path)


def test_a_pair_longer_than_the_window_is_found_in_the_data_of_evaluations(windowed_dir, config, tmp_path, monkeypatch):
    seen = []
    real = batches.compare_layouts
    monkeypatch.setattr(batches, "compare_layouts", lambda *given: seen.append(given[2]) or real(*given))
    short = [tiny.chat_row("a?", "b", "c") for _ in range(8)]
    files = [tiny.write_rows(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate((short, [*short, LONG]))]
    train, test = ([{"path": str(file), "ds_type": "json", "type": "dpo_plugin.chat"}] for file in files)
    host.train(config(windowed_dir, datasets=train, test_datasets=test), tmp_path / "run")
    assert max(prefix + chosen for prefix, chosen, _ in seen[0].segments) > WINDOW


def test_an_evaluation_compares_too(windowed_dir, config, tmp_path, log):
    run = host.train(config(windowed_dir, val_set_size=0.1), tmp_path)
    trainer, lines = run.trainer, len(said(log))
    trainer.compared = None
    flat = trainer.evaluate()
    assert len(said(log)) == lines + 1
    trainer.data_collator.flat = False
    attention.attend_to_rows(trainer.model)
    assert flat["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)
