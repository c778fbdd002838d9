"""An adapter named by its repository on the hub, from the hub's cache; without network the message says so."""

import shutil

import pytest

from dpo_plugin.errors import AdapterError
from dpo_plugin.host.plugin import DPOPlugin
from dpo_plugin.model import adapter_config
from tests.support import host
from tests.support.tiny import dpo_config


def cached(root, name, folder):
    """Lay a repository's files out as the hub's cache does."""
    repository = root / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))


def test_a_repository_in_the_cache(sft_dir, tmp_path, monkeypatch):
    cached(tmp_path, "owner/sft-adapter", sft_dir)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = adapter_config.open_adapter("owner/sft-adapter", "lora_model_dir")
    assert found.path.parent.name == "snapshots"
    assert found.config["r"] == 8


@pytest.mark.parametrize("key", ["lora_model_dir", "adapter_dir"])
def test_a_yaml_names_a_repository(base_dir, sft_dir, tmp_path, monkeypatch, key):
    cached(tmp_path, "owner/sft-adapter", sft_dir)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    adapters = {"lora_model_dir": str(sft_dir), "adapter_dir": str(sft_dir), key: "owner/sft-adapter"}
    reference = {"reference": {"adapter_dir": adapters.pop("adapter_dir")}}
    host.load_config(dpo_config(base_dir, tmp_path / "out", **adapters, dpo_plugin=reference), tmp_path)
    settings = DPOPlugin.active().run_settings()
    found = {"lora_model_dir": settings.policy, "adapter_dir": settings.reference.adapter}
    assert {name for name, folder in found.items() if folder.path.parent.name == "snapshots"} == {key}


def test_a_folder_comes_first(sft_dir, tmp_path, monkeypatch):
    shutil.copytree(sft_dir, tmp_path / "owner" / "sft-adapter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapter_config, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    assert str(adapter_config.open_adapter("owner/sft-adapter", "lora_model_dir").path) == "owner/sft-adapter"
    with pytest.raises(AdapterError, match=r"`lora_model_dir: ./owner/none` does not exist. Write: lora_model_dir:"):
        adapter_config.open_adapter("./owner/none", "lora_model_dir")


@pytest.mark.parametrize("key", ["lora_model_dir", "dpo_plugin.reference.adapter_dir"])
def test_offline(tmp_path, monkeypatch, key):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AdapterError) as error:
        adapter_config.open_adapter("owner/sft-adapter", key)
    said = str(error.value)
    assert "is not in the hub's cache, and the hub is not reached from here" in said
    assert "HF_HUB_OFFLINE is set" in said
    assert said.endswith(f"write: {key.rpartition('.')[2]}: <folder with adapter_config.json>")
    assert len(said) < 500
