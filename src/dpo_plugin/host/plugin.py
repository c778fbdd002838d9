"""`DPOPlugin`: what axolotl calls, from the raw YAML to the saved adapter."""

from __future__ import annotations

from typing import Any

from axolotl.common.datasets import TrainDatasetMeta
from axolotl.integrations.base import BasePlugin, PluginManager

from dpo_plugin.errors import AdapterError, ConfigError
from dpo_plugin.host import datasets as host_datasets
from dpo_plugin.host.log import LOG
from dpo_plugin.host.settings import RunSettings, read_settings
from dpo_plugin.model.adapters import REFERENCE, PolicyReferenceModel, adapter_digest

TRAINER = "dpo_plugin.host.trainer.PreferenceTrainer"


class DPOPlugin(BasePlugin):  # type: ignore[misc]
    """DPO from an SFT adapter; add ``plugins: [dpo_plugin.DPOPlugin]`` to an axolotl config."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: RunSettings | None = None

    @staticmethod
    def active() -> DPOPlugin:
        """The instance that axolotl has registered in this process."""
        for plugin in PluginManager.get_instance().plugins.values():
            if isinstance(plugin, DPOPlugin):
                return plugin
        raise ConfigError("the trainer of dpo_plugin runs without its plugin. Write: plugins: [dpo_plugin.DPOPlugin]")

    def run_settings(self) -> RunSettings:
        """The settings that `register` read."""
        if self.settings is None:
            raise ConfigError("dpo_plugin has nothing to do in this config. Write: rl: dpo")
        return self.settings

    def register(self, cfg: Any) -> None:
        """Check the config and arrange our trainer; called with the raw YAML, before any model is loaded.

        Raises:
            DPOPluginError: For anything that the config alone shows to be wrong.
        """
        self.settings = None
        if str(cfg.get("rl")) not in ("dpo", "ipo"):
            LOG.info(f"dpo_plugin: nothing to do for `rl: {cfg.get('rl')}`; it serves rl: dpo and rl: ipo.")
            if cfg.get("trainer_cls") == TRAINER:
                del cfg["trainer_cls"]
            return
        if cfg.get("trainer_cls") not in (None, TRAINER):
            raise ConfigError(
                f"`trainer_cls: {cfg['trainer_cls']}` would replace dpo_plugin's trainer. Remove one of the two lines."
            )
        self.settings = read_settings(cfg)
        cfg["trainer_cls"] = TRAINER

    def get_input_args(self) -> str:
        """The schema that is mixed into axolotl's."""
        return "dpo_plugin.config.DPOPluginArgs"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> TrainDatasetMeta | None:
        """Prepare the data if all of it comes in our formats; otherwise leave it to the host."""
        if self.settings is None:
            return None
        return host_datasets.load_datasets(cfg, self.settings)

    def post_train(self, cfg: Any, model: Any) -> None:
        """Check that the reference is still what was attached; the host calls this twice."""
        if isinstance(model, PolicyReferenceModel) and model.has_reference:
            check_reference_unchanged(model)


def check_reference_unchanged(model: PolicyReferenceModel) -> None:
    """Raise if the reference adapter's bytes are not those that were attached.

    Raises:
        AdapterError: Naming both digests.
    """
    if any(not parameter.numel() for parameter in model.parameters()):
        return  # partitioned by ZeRO-3: this rank does not hold the tensors
    now = adapter_digest(model, REFERENCE)
    if now != model.digests[REFERENCE]:
        raise AdapterError(
            f"the reference adapter has changed during training: sha256 {model.digests[REFERENCE]} before, {now} now. "
            "Another plugin or callback writes to it; remove that."
        )
