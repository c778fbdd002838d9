"""A host outside of what was tested is named once; a TRL that lacks what is overridden ends before anything is read."""

import ast
import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType

import pytest
import trl
from transformers import TrainingArguments

from dpo_plugin import host
from dpo_plugin.errors import DPOPluginError
from dpo_plugin.host import versions
from dpo_plugin.host.trainer import PreferenceTrainer

pytestmark = pytest.mark.core


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(versions.LOG, "warning_once", lines.append)
    return lines


def pretend(monkeypatch, **installed):
    real = importlib.metadata.version
    monkeypatch.setattr(versions, "version", lambda name: installed.get(name) or real(name))


def test_nothing_is_said_of_what_was_tested(said):
    versions.check_versions()
    assert not said


@pytest.mark.parametrize("version", ["0.18.2", "0.22.0", "0.23.0.dev1"])
def test_an_axolotl_that_was_not_tested_is_named_and_the_run_goes_on(version, said, monkeypatch):
    pretend(monkeypatch, axolotl=version)
    versions.check_versions()
    assert len(said) == 1
    assert f"axolotl {version} was not tested" in said[0]
    assert said[0].endswith("pip install 'axolotl<0.22,>=0.19'")


def test_a_trl_that_lacks_what_is_overridden_is_refused_with_both_versions(monkeypatch):
    pretend(monkeypatch, trl="2.0.0", transformers="6.1.0")
    monkeypatch.delattr(trl.DPOTrainer, "_compute_loss")
    with pytest.raises(
        DPOPluginError, match=r"trl 2.0.0 on transformers 6.1.0 lacks .*\(_compute_loss\); trl<1.15,>=1.9 has"
    ):
        versions.check_versions()


def test_a_trl_without_its_trainer_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", ModuleType("trl"))
    with pytest.raises(DPOPluginError, match=r"lacks what .* pip install 'trl"):
        versions.check_versions()


def attributes_of(*owners):
    """Names of all attributes that `host` reads from expressions that end so."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in Path(host.__path__[0]).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if ast.unparse(node.value).endswith(owners)}


def test_all_that_is_overridden_or_called_is_asked_for():
    overridden = {name for name in vars(PreferenceTrainer) if not name.startswith("__")}
    called = attributes_of("self", "super()", "trainer", "super(AxolotlDPOTrainer, self)")
    theirs = {name for name in overridden | called if hasattr(trl.DPOTrainer, name)} - {"__init__"}
    assert theirs == set(versions.LEANED_ON)


def test_all_settings_of_trl_that_are_read_are_asked_for():
    own = trl.DPOConfig.__dataclass_fields__.keys() - TrainingArguments.__dataclass_fields__.keys()
    assert attributes_of("args", "kwargs['args']") & own == set(versions.SETTINGS)


def test_a_trl_without_a_setting_is_refused(monkeypatch):
    fields = {name: field for name, field in trl.DPOConfig.__dataclass_fields__.items() if name != "use_weighting"}
    monkeypatch.setattr(trl.DPOConfig, "__dataclass_fields__", fields)
    with pytest.raises(DPOPluginError, match=r"lacks what .* \(use_weighting\); trl<1.15"):
        versions.check_versions()
