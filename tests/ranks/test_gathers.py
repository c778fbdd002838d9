"""A micro-step gathers parameters no more often than stock axolotl's and TRL's on the same two adapters."""

import json

import pytest

from tests.ranks.shipped import config
from tests.support.cpu_ranks import PLUGINS, launch
from tests.support.gathers import STOCK, gathers_file
from tests.support.tiny import ROOT

COUNT = "tests.support.gathers.CountGathers"


def conversation(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def data(tmp_path):
    """Rows that stock reads as well."""
    file = tmp_path / "pairs.jsonl"
    rows = [
        {
            "chosen": conversation(f"What is {i} plus one?", f"It is {i + 1}, of course."),
            "rejected": conversation(f"What is {i} plus one?", "I do not know that."),
        }
        for i in range(16)
    ]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"path": str(file), "ds_type": "json", "split": "train"}


def short(name, base_dir, sft, folder, data, kind):
    settings = {
        "datasets": [{**data, "type": kind}],
        "test_datasets": None,
        "chat_template": "tokenizer_default",
        "max_steps": 2,
        "lora_dropout": 0.0,
        **dict.fromkeys(("eval_strategy", "eval_steps", "save_steps")),
        "save_strategy": "no",
    }
    if name == "zero3-nf4":  # as shipped, all parameters of a tiny model would be kept on each rank
        engine = json.loads((ROOT / "deepspeed_configs/zero3_bf16.json").read_text(encoding="utf-8"))
        engine["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        settings["deepspeed"] = engine
    return config(name, base_dir, sft, folder, **settings)


@pytest.mark.parametrize("name", ["zero3-nf4", "fsdp2-nf4", "fsdp2-bf16"])
def test_gathers_per_micro_step(name, base_dir, sft, data, tmp_path):
    run = launch(
        short(name, base_dir, sft, tmp_path / "a", data, "dpo_plugin.chat"), tmp_path / "a", more_plugins=(COUNT,)
    )
    assert run.returncode == 0, run.error()
    stock = short(name, base_dir, sft, tmp_path / "b", data, "chat_template.argilla_chat")
    stock["trainer_cls"] = STOCK
    del stock["dpo_plugin"]  # axolotl 0.21 finds the plugin, which acts where there is a section
    theirs = launch(stock, tmp_path / "b", plugins=PLUGINS[:1], more_plugins=(COUNT,))
    assert theirs.returncode == 0, theirs.error()
    found, expected = (json.loads(gathers_file(run.output_dir).read_text()) for run in (run, theirs))
    print(f"\n{name}: [gathers, bytes] per micro-step: ours {found}, stock's {expected}")
    assert len(found) == len(expected) == 4
    assert all(count > 0 for count, _ in found)
    assert all(ours <= stock for (ours, _), (stock, _) in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["zero3-nf4", "fsdp2-nf4"])
def test_a_kept_reference_spares_its_forwards_gathers(name, base_dir, sft, data, tmp_path):
    counts = []
    for keep in (False, True):
        settings = short(name, base_dir, sft, tmp_path / str(keep), data, "dpo_plugin.chat")
        settings["max_steps"] = 4  # the first batches with log-probs from disk are compared with a forward
        settings["precompute_ref_log_probs"] = keep
        settings["dpo_plugin"] = {"reference": {"cache": str(tmp_path / "kept") if keep else False}}
        run = launch(settings, tmp_path / str(keep), more_plugins=(COUNT,))
        assert run.returncode == 0, run.error()
        counts.append(json.loads(gathers_file(run.output_dir).read_text())[-1][0])
    print(f"\n{name}: gathers per micro-step: {counts[0]}, with a kept reference {counts[1]}")
    assert counts[1] < counts[0]
