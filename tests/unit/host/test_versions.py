"""A host outside of what was tested is named once; a TRL that lacks what is overridden ends before anything is read."""

import importlib.metadata
import sys
from types import ModuleType

import pytest
import trl

from dpo_plugin.errors import DPOPluginError
from dpo_plugin.host import versions

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
