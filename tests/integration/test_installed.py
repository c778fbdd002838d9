"""The installed package: which configs axolotl 0.21 and newer apply the plugin to, and the recipes in the wheel."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import axolotl
import pytest
import yaml
from axolotl.integrations import base as integrations
from axolotl.integrations.base import PluginManager
from packaging.version import Version
from safetensors.torch import load_file
from transformers import set_seed

import dpo_plugin
from dpo_plugin.config import asks_for_plugin
from dpo_plugin.errors import DPOPluginError
from dpo_plugin.host.plugin import DPOPlugin
from tests.support import host, tiny

pytestmark = pytest.mark.core
FINDS_PLUGINS = hasattr(integrations, "PLUGIN_ENTRY_POINT_GROUP")
OURS = "dpo_plugin.DPOPlugin"


def test_the_package_offers_its_plugin_to_the_host():
    offered = importlib.metadata.entry_points(group="axolotl.plugins")
    assert [point.load() for point in offered if point.name == "dpo_plugin"] == [DPOPlugin]
    assert (Version(axolotl.__version__) >= Version("0.21")) == FINDS_PLUGINS


@pytest.mark.parametrize(
    ("config", "ours"),
    [
        ({"plugins": [OURS], "rl": "dpo"}, True),
        ({"plugins": ["dpo_plugin:DPOPlugin"]}, True),
        ({"dpo_plugin": {}}, True),
        ({"datasets": [{"path": "a"}, {"path": "b", "type": "dpo_plugin.chat"}]}, True),
        ({"test_datasets": [{"path": "b", "type": "dpo_plugin.chat"}]}, True),
        ({"rl": "dpo", "datasets": [{"path": "a", "type": "chat_template.default"}]}, False),
        ({"rl": "dpo", "plugins": ["axolotl.integrations.liger.LigerPlugin"], "datasets": "a"}, False),
        ({"datasets": [{"path": "a", "type": {"field_messages": "m"}}, 3], "plugins": None}, False),
    ],
)
def test_a_config_that_names_the_plugin_asks_for_it(config, ours):
    assert asks_for_plugin(config) == ours


STOCK = {"path": str(tiny.ROOT / "recipes/data/preferences.jsonl"), "ds_type": "json", "type": "chat_template.default"}
SFT = {"path": str(tiny.ROOT / "recipes/data/sft.jsonl"), "ds_type": "json", "type": "chat_template"}
CONFIGS = {
    "dpo": {
        "datasets": [{**STOCK, "field_messages": "chosen", "field_chosen": "chosen", "field_rejected": "rejected"}]
    },
    "sft": {"rl": None, "rl_beta": None, "datasets": [{**SFT, "field_messages": "messages"}]},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_does_not_name_the_plugin_trains_as_without_it(kind, base_dir, tmp_path, monkeypatch):
    """Bit for bit: adapter, losses, and no file or setting of ours."""

    def train(folder):
        set_seed(0)  # axolotl 0.19 draws a fresh LoRA before it sets its own
        settings = {**CONFIGS[kind], "plugins": None, "save_strategy": "no", "save_steps": None, "max_steps": 3}
        run = host.train(tiny.dpo_config(base_dir, folder / "out", **settings), folder)
        weights = load_file(run.output_dir / "adapter_model.safetensors")
        return run, weights, [line["loss"] for line in run.lines]

    with monkeypatch.context() as patched:
        patched.setattr(integrations, "entry_points", lambda group: [], raising=False)
        _, expected, losses = train(tmp_path / "without")
        assert OURS not in PluginManager.get_instance().plugins
    run, found, found_losses = train(tmp_path / "with")
    assert (OURS in PluginManager.get_instance().plugins) == FINDS_PLUGINS
    assert type(run.trainer).__module__.startswith("axolotl.")
    assert found_losses == losses
    assert {key: value.tolist() for key, value in found.items()} == {k: v.tolist() for k, v in expected.items()}
    assert not list(run.output_dir.glob("dpo*"))


@pytest.mark.skipif(not FINDS_PLUGINS, reason="axolotl 0.19 and 0.20 know no entry points of plugins")
def test_a_section_is_enough_where_the_host_finds_plugins(base_dir, sft_dir, tmp_path):
    settings = {
        "plugins": None,
        "lora_model_dir": str(sft_dir),
        "save_strategy": "no",
        "save_steps": None,
        "max_steps": 1,
    }
    run = host.train(tiny.dpo_config(base_dir, tmp_path / "out", **settings, dpo_plugin={}), tmp_path)
    assert run.trainer.model.has_reference
    assert run.lines[0]["loss"] == pytest.approx(0.693147, abs=1e-4)


def test_a_plugin_that_cannot_be_imported_ends_the_runs_that_name_it_and_no_other(monkeypatch):
    """The host prints such an error and trains without the plugin: 0.19 always, 0.21 where it found the plugin itself."""
    monkeypatch.setitem(dpo_plugin._LAZY, "DPOPlugin", "dpo_plugin.no_such_module")
    monkeypatch.delitem(vars(dpo_plugin), "DPOPlugin", raising=False)
    monkeypatch.setattr(PluginManager, "_instance", None)
    manager = PluginManager.get_instance()
    monkeypatch.setattr(manager, "plugins", type(manager.plugins)())
    manager.register(OURS)
    (plugin,) = manager.plugins.values()
    plugin.register({"rl": "dpo", "datasets": [{"path": "a", "type": "chat_template.default"}]})
    with pytest.raises(DPOPluginError, match=r"no_such_module.*Reinstall with: pip install"):
        plugin.register({"rl": "dpo", "dpo_plugin": {}})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder with what a wheel installs; built from a copy of the tree, as a build leaves its own folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    tiny.copy_tree(folder / "tree")
    offline = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    for words in (["wheel", "--no-build-isolation", "./tree", "-w", "dist"], ["install", "--target", "site"]):
        made = [str(path) for path in folder.glob("dist/*.whl")]
        subprocess.run([sys.executable, "-m", "pip", *words, *made, *offline], cwd=folder, check=True)
    return folder / "site"


def of_wheel(wheel, folder, *words):
    """What `axolotl dpo recipes` prints where only the wheel is installed."""
    line = [sys.executable, "-m", "dpo_plugin", "recipes", *words]
    env = {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["tiny-dpo", "qwen72b-dpo"])
def test_the_wheel_copies_a_recipe_that_the_host_takes(name, wheel, base_dir, tmp_path, monkeypatch):
    listing = json.loads(of_wheel(wheel, tmp_path, "--json"))
    assert {one["name"] for one in listing["recipes"]} == {file.stem for file in (tiny.ROOT / "recipes").glob("*.yaml")}
    copied = json.loads(of_wheel(wheel, tmp_path, name, "--copy", ".", "--json"))
    assert {*copied["written"]} == {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    raw = yaml.safe_load((tmp_path / f"{name}.yaml").read_text("utf-8"))
    tiny.save_adapter(base_dir, tmp_path / raw["lora_model_dir"], r=raw["lora_r"], lora_alpha=raw["lora_alpha"])
    monkeypatch.chdir(tmp_path)
    cfg = host.validated(raw)
    assert cfg.trainer_cls == "dpo_plugin.host.trainer.PreferenceTrainer"
    if name == "tiny-dpo":
        assert all(Path(part.path).is_file() for part in (*cfg.datasets, *cfg.test_datasets))
    else:
        assert json.loads(Path(cfg.deepspeed).read_text("utf-8"))["zero_optimization"]["stage"] == 3
