"""A value that a key cannot have is one line of ours that names the key and ends with the line to write."""

import re

import pytest
import yaml
from axolotl.utils.schemas.config import AxolotlInputConfig
from click.testing import CliRunner

from dpo_plugin.errors import ConfigError
from dpo_plugin.host.commands.cli import dpo
from dpo_plugin.host.plugin import DPOPlugin
from dpo_plugin.host.settings import read_settings
from dpo_plugin.host.yaml_keys import LINES_OF_OTHERS as LINES
from dpo_plugin.host.yaml_keys import RawConfig, typed
from tests.fuzz import configs
from tests.support import host
from tests.support.tiny import ROOT, dpo_config

ROWS = str(ROOT / "recipes/data/preferences.jsonl")


def entry(**keys):
    return {"datasets": [{"path": ROWS, "ds_type": "json", "type": "dpo_plugin.chat", **keys}]}


WRONG = [
    ({"lora_model_dir": 3}, "lora_model_dir", "lora_model_dir: ./SFT_LoRA"),
    ({"lora_model_dir": "x" * 300}, "lora_model_dir", "lora_model_dir: ./SFT_LoRA"),
    ({"datasets": "."}, "datasets", "datasets: [{path: data/preferences.jsonl, type: dpo_plugin.chat}]"),
    ({"datasets": [3]}, "datasets[0]", "datasets: [{path: data/preferences.jsonl, type: dpo_plugin.chat}]"),
    ({"datasets": "file.jsonl"}, "datasets", "datasets: [{path: data/preferences.jsonl, type: dpo_plugin.chat}]"),
    ({"test_datasets": [3]}, "test_datasets[0]", "test_datasets: [{path: data/held_out.jsonl, type: dpo_plugin.chat}]"),
    ({"tensor_parallel_size": "0.0"}, "tensor_parallel_size", "tensor_parallel_size: 1"),
    ({"rl_beta": []}, "rl_beta", "rl_beta: 0.1"),
    ({"rl_beta": float("inf")}, "rl_beta", "rl_beta: 0.1"),
    ({"rl_beta": True}, "rl_beta", "rl_beta: 0.1"),
    ({"lora_r": ""}, "lora_r", "lora_r: 16"),
    ({"dpo_label_smoothing": " "}, "dpo_label_smoothing", "dpo_label_smoothing: 0.1"),
    ({"dpo_loss_weights": 1}, "dpo_loss_weights", "dpo_loss_weights: [1.0]"),
    ({"dpo_loss_weights": [-1.0]}, "dpo_loss_weights[0]", "dpo_loss_weights: [1.0]"),
    ({"dpo_loss_weights": [0.0]}, "dpo_loss_weights", "dpo_loss_weights: [1.0]"),
    ({"dpo_loss_type": [3]}, "dpo_loss_type[0]", "dpo_loss_type: [sigmoid]"),
    ({"dpo_loss_type": "sigmoid"}, "dpo_loss_type", "dpo_loss_type: [sigmoid]"),
    ({"dpo_loss_type": []}, "dpo_loss_type", "dpo_loss_type: [sigmoid]"),
    ({"fsdp_config": " "}, "fsdp_config", "fsdp_config: {version: 2, reshard_after_forward: true}"),
    ({"fsdp_config": {"fsdp_version": "two"}}, "fsdp_config.fsdp_version", "fsdp_version: 2"),
    ({"deepspeed": 3}, "deepspeed", "deepspeed: deepspeed_configs/zero3_bf16.json"),
    ({"deepspeed": {"zero_optimization": 3}}, "deepspeed.zero_optimization", "zero_optimization: {stage: 3}"),
    ({"deepspeed": {"zero_optimization": {"stage": "three"}}}, "deepspeed.zero_optimization.stage", "stage: 3"),
    ({"context_parallel_size": "~"}, "context_parallel_size", "context_parallel_size: 1"),
    ({"dataset_prepared_path": "/dev/null"}, "dataset_prepared_path", "dataset_prepared_path: last_run_prepared"),
    ({"output_dir": "/dev/null/out"}, "output_dir", "output_dir: ./outputs/dpo"),
    ({"rl_beta": [[{}]]}, "rl_beta", "rl_beta: 0.1"),
    ({"dpo_plugin": {"compute": {"checkpoint_layers": [[{}]]}}}, "dpo_plugin.compute.checkpoint_layers", "checkpoint_layers: auto"),
    ({"dpo_plugin": {"reference": {"cache": "/dev/null"}}}, "dpo_plugin.reference.cache", "cache: true"),
    (entry(data_files=1), "datasets[0].data_files", "data_files: [data/preferences.jsonl]"),
    (entry(roles=["user"]), "datasets[0].roles", "roles: {user: [human]}"),
    (entry(roles={"user": "human"}), "datasets[0].roles.user", "roles: {user: [human]}"),
    (entry(roles={"usr": ["visitor"]}), "datasets[0].roles.usr", "roles: {user: [human]}"),
    (entry(message_property_mappings="role"), "datasets[0].message_property_mappings", "message_property_mappings: {role: from, content: value}"),
    (entry(chat_template="nope"), "datasets[0].chat_template", "chat_template: chatml"),
    ({"chat_template": "nope"}, "chat_template", "chat_template: chatml"),
    (entry(ds_type="nope"), "datasets[0].ds_type", "ds_type: json"),
    (entry(shards=2), "datasets[0].shards", "shards: 1"),
    (entry(path=None), "datasets[0].path", "path: data/preferences.jsonl"),
    (entry(path="~"), "datasets[0].path", "path: data/preferences.jsonl"),
    (entry(path="/"), "datasets[0].path", "path: data/preferences.jsonl"),
    (entry(path="."), "datasets[0].path", "path: data/preferences.jsonl"),
    ({"micro_batch_size": 0}, "micro_batch_size", "micro_batch_size: 1"),
    ({"gradient_accumulation_steps": None}, "gradient_accumulation_steps", "gradient_accumulation_steps: 1"),
    ({"seed": -1}, "seed", "seed: 42"),
    ({"optimizer": b"adamw_torch"}, "optimizer", "optimizer: adamw_torch_fused"),
    ({"num_epochs": float("nan")}, "num_epochs", "num_epochs: 1"),
    ({"val_set_size": 2}, "val_set_size", "val_set_size: 0.05"),
    ({"dpo_plugin": []}, "dpo_plugin", "dpo_plugin: {reference: {strategy: adapter}}"),
    ({"dpo_plugin": {"data": {"roles": {"visitor": "usr"}}}}, "dpo_plugin.data.roles.visitor", "roles: {visitor: user}"),
]  # fmt: skip


def assert_ends_with_the_line(text, key, line):
    assert f"`{key}`" in text
    assert text.endswith(f". Write: {line}")
    assert len(text) < 500


@pytest.mark.parametrize(("change", "key", "line"), WRONG)
def test_a_value_of_the_wrong_type(base_dir, tmp_path, monkeypatch, change, key, line):
    monkeypatch.setattr("dpo_plugin.data.sources._digest", lambda *_: pytest.fail("files were read"))
    with pytest.raises(ConfigError) as error:
        host.load_config({**dpo_config(base_dir, tmp_path / "out"), **change}, tmp_path)
    assert_ends_with_the_line(str(error.value), key, line)


TRL = [
    ({"beta": 0.2}, "`beta: 0.2`", "rl_beta: 0.2"),
    ({"loss_type": ["ipo"]}, "`loss_type: ipo`", "dpo_loss_type: [ipo]"),
    ({"loss_weights": [1.0, 0.5]}, "`loss_weights: 1.0, 0.5`", "dpo_loss_weights: [1.0, 0.5]"),
    ({"max_length": 1024}, "`max_length: 1024`", "sequence_len: 1024"),
    ({"max_prompt_length": 512}, "`max_prompt_length: 512`", "sequence_len: <tokens of prompt and completion>"),
    ({"ref_adapter_name": "ref"}, "`ref_adapter_name: ref`", "dpo_plugin: {reference: {adapter_dir: <folder of the adapter>}}"),
    ({"rl_adapter_ref_model": "sft"}, "`rl_adapter_ref_model: sft`", "dpo_plugin: {reference: {adapter_dir: <folder of the adapter>}}"),
    ({"f_divergence_type": "js_divergence"}, "`f_divergence_type: js_divergence`", "dpo_plugin: {loss: {f_divergence: js_divergence}}"),
    ({"per_device_train_batch_size": 2}, "`per_device_train_batch_size: 2`", "micro_batch_size: 2"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "key", "line"), TRL)
def test_a_name_of_trl(base_dir, tmp_path, change, key, line):
    with pytest.raises(ConfigError) as error:
        host.load_config(dpo_config(base_dir, tmp_path / "out", **change), tmp_path)
    assert str(error.value).startswith(key)
    assert str(error.value).endswith(f"would leave it out. Write: {line}")


def test_no_name_of_trl_is_a_key_of_the_host():
    from axolotl.utils.schemas.config import AxolotlInputConfig

    assert not set(LINES) & set(AxolotlInputConfig.model_fields)


@pytest.mark.parametrize(
    ("change", "rank", "hints"),
    [({}, 0, 1), ({}, 1, 0), ({"val_set_size": 0.1}, 0, 0), ({"test_datasets": entry()["datasets"]}, 0, 0)],
)
def test_one_hint_without_held_out_pairs(base_dir, tmp_path, monkeypatch, change, rank, hints):
    said = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("dpo_plugin.host.plugin.LOG.info", said.append)
    host.load_config(dpo_config(base_dir, tmp_path / "out", **change), tmp_path)
    assert len([line for line in said if line.endswith("Write: val_set_size: 0.05")]) == hints


@pytest.mark.parametrize("name", sorted(RawConfig.model_fields))
def test_the_line_that_is_proposed_is_read(name):
    """And so is it written as text, where the host turns text into a number: YAML 1.1 reads 1e-5 as text."""
    (line,) = RawConfig.model_fields[name].examples
    assert typed({name: line})[name] == line
    if isinstance(line, float):
        assert typed({name: str(line)})[name] == line


def test_what_works_today_is_read():
    lenient = {
        "lora_model_dir": "", "deepspeed": "", "rl_beta": "1e-1", "micro_batch_size": "4", "fsdp_version": "2",
        "load_in_4bit": "false", "lora_alpha": 16, "datasets": None, "gradient_checkpointing": "offload", 3: 4,
        "not_ours": {"a": [1]},
    }  # fmt: skip
    read = typed(lenient)
    assert (read["lora_model_dir"], read["deepspeed"], read["load_in_4bit"]) == (None, None, False)
    assert (read["rl_beta"], read["micro_batch_size"], read["fsdp_version"]) == (0.1, 4, 2)
    assert read["not_ours"] == {"a": [1]}


@pytest.mark.parametrize(
    ("name", "text"), [("json", '{"zero_optimization": {"stage": [3]}}'), ("list", "[3]"), ("torn", "{")]
)
def test_a_deepspeed_file(base_dir, tmp_path, name, text):
    (tmp_path / "zero.json").write_text(text)
    with pytest.raises(ConfigError, match=r"`deepspeed: .*zero.json`.* Write: (deepspeed|stage): \S+$"):
        host.load_config(dpo_config(base_dir, tmp_path / "out", deepspeed=str(tmp_path / "zero.json")), tmp_path)


@pytest.mark.parametrize(
    "text",
    ["- a\n- b\n", "3", "", "plugins: [\n", "\x00", "plugins: dpo_plugin.DPOPlugin\n", "plugins: [dpo_plugin.DPOPlugin]\nrl: dpo\ndatasets: 3\n"],
)  # fmt: skip
@pytest.mark.parametrize("command", [["preview"], ["compare"], ["plan", "--gpus", "1", "--gpu-memory", "80"]])
def test_a_file_that_is_no_config(command, text, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    ended = CliRunner().invoke(dpo, [command[0], str(file), *command[1:]])
    assert ended.exit_code == 1
    (line,) = [line for line in ended.output.splitlines() if line.startswith("Error: ")]
    assert len(line) < 500
    assert yaml.safe_load(re.search(r"Write: (.+)$", line).group(1))


def test_random_configs_never_end_bare(tmp_path):
    outcomes, bare = configs.run(seed=11, count=150, folder=tmp_path)
    assert not bare
    assert outcomes["refused"] > 75
    assert outcomes["read"] > 0


@pytest.mark.parametrize(("written", "expected"), [(None, False), (False, False), (True, True)])
def test_a_loss_that_is_nan_is_logged_as_it_is_unless_the_yaml_says_otherwise(base_dir, tmp_path, written, expected):
    cfg = host.load_config(dpo_config(base_dir, tmp_path / "out", logging_nan_inf_filter=written), tmp_path)
    known = "logging_nan_inf_filter" in AxolotlInputConfig.model_fields  # before axolotl 0.21 it is dropped from a YAML
    assert DPOPlugin.active().get_training_args(cfg)["logging_nan_inf_filter"] == (expected and known)


def test_who_packs_the_weights_decides_which_reference_log_probs_are_read_again(base_dir, tmp_path):
    qlora = {"adapter": "qlora", "load_in_4bit": True}
    numerics = [
        read_settings(typed(dpo_config(base_dir, tmp_path / "out", **qlora, **more))).numerics
        for more in ({}, {"nf4_backend": "torchao"})
    ]
    assert numerics[0] != numerics[1]
