"""`DPOPlugin`: what axolotl calls, from the raw YAML to the saved adapter."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from axolotl.common.datasets import TrainDatasetMeta
from axolotl.integrations.base import BasePlugin, PluginManager
from transformers import EarlyStoppingCallback

from dpo_plugin.config import asks_for_plugin
from dpo_plugin.engines.sharded import reference_digest
from dpo_plugin.errors import AdapterError, ConfigError, report_errors
from dpo_plugin.host import base_model
from dpo_plugin.host import datasets as host_datasets
from dpo_plugin.host.commands import running
from dpo_plugin.host.log import LOG
from dpo_plugin.host.output_dir.lock import hold, release
from dpo_plugin.host.settings import RunSettings, read_settings
from dpo_plugin.host.versions import check_versions
from dpo_plugin.host.workarounds import (
    accept_fsdp2_with_nf4,
    ignore_deprecated_collectives,
    load_base_through,
    share_parameter_wrappers,
)
from dpo_plugin.host.yaml_keys import typed
from dpo_plugin.model.adapter_config import AdapterFolder
from dpo_plugin.model.adapters import PolicyReferenceModel
from dpo_plugin.report.shown import shown_settings

TRAINER = "dpo_plugin.host.trainer.PreferenceTrainer"


class DPOPlugin(BasePlugin):  # type: ignore[misc]
    """DPO from an SFT adapter; add ``plugins: [dpo_plugin.DPOPlugin]`` to an axolotl config."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: RunSettings | None = None
        self.asked_for = True
        self.shown: dict[str, Any] = {}
        self.planned: base_model.Planned | None = None

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
        self.settings, self.asked_for = None, asks_for_plugin(cfg)
        if not self.asked_for:
            return
        report_errors()
        check_versions()
        self.shown = shown_settings(cfg)  # as written, before the host adds its defaults
        command = running.running_command(cfg)
        if running.intended_rl(cfg) in ("dpo", "ipo") and command != "train":
            running.leave_out_engine(cfg)
            if command == "merge-lora":
                running.complete_merges()
            if command != "evaluate":
                running.use_trained_adapter(cfg, command)
                return
        if str(cfg.get("rl")) not in ("dpo", "ipo"):
            LOG.info(f"dpo_plugin: nothing to do for `rl: {cfg.get('rl')}`; it serves rl: dpo and rl: ipo.")
            if cfg.get("trainer_cls") == TRAINER:
                del cfg["trainer_cls"]
            return
        if cfg.get("trainer_cls") not in (None, TRAINER):
            raise ConfigError(
                f"`trainer_cls: {cfg['trainer_cls']}` would replace dpo_plugin's trainer. Remove one of the two. "
                "Write: trainer_cls: null"
            )
        raw = typed(cfg)
        self.settings = read_settings(raw)
        ignore_deprecated_collectives()
        if command == "evaluate":
            self.settings = settings_for_evaluation(cfg, self.settings)
        elif not (raw.get("test_datasets") or raw.get("val_set_size")) and os.environ.get("RANK", "0") == "0":
            LOG.info("dpo_plugin: no pairs are held out, so overfitting cannot be seen. Write: val_set_size: 0.05")
        check_host_memory(raw, self.settings)
        accept_fsdp2_with_nf4(TRAINER)
        share_parameter_wrappers()
        load_base_through(load_base)
        cfg["trainer_cls"] = TRAINER
        cfg["logging_nan_inf_filter"] = bool(cfg.get("logging_nan_inf_filter"))  # before the host's default, true

    def get_input_args(self) -> str | None:
        """The schema that is mixed into axolotl's, if the config is for us."""
        return "dpo_plugin.config.DPOPluginArgs" if self.asked_for else None

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Keys of the YAML that axolotl 0.19 to 0.21 passes on for SFT alone (core/builders/causal.py:221,251).

        And a loss that is NaN is logged as it is, unless the YAML says otherwise: transformers replaces it by the mean
        of the others, and asks the device for it in every micro-step (trainer.py, ``logging_nan_inf_filter``).
        """
        if self.settings is None:
            return {}
        keys = ("metric_for_best_model", "greater_is_better", "load_best_model_at_end")
        found = {key: cfg[key] for key in keys if cfg.get(key) is not None}
        found["logging_nan_inf_filter"] = bool(cfg.logging_nan_inf_filter)  # axolotl's own key since 0.21
        return {**found, "load_best_model_at_end": True} if cfg.early_stopping_patience else found

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Early stopping, which axolotl 0.19 to 0.21 sets up for SFT alone (core/builders/causal.py:123)."""
        if self.settings is None or not cfg.early_stopping_patience:
            return []
        return [EarlyStoppingCallback(cfg.early_stopping_patience)]

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> TrainDatasetMeta | None:
        """Prepare the data if all of it comes in our formats; otherwise leave it to the host."""
        if self.settings is None:
            return None
        if not preprocess:
            hold(Path(cfg.output_dir))
        return host_datasets.load_datasets(cfg, self.settings)

    def pre_model_load(self, cfg: Any) -> None:
        """Count the base before the host sets up ZeRO-3."""
        if self.settings is not None:
            self.planned = base_model.plan_loading(cfg, self.settings)

    def post_train_unload(self, cfg: Any) -> None:
        """Let another run have the output folder."""
        if self.settings is not None:
            release(Path(cfg.output_dir))

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Give the adapters back the values that they were attached with."""
        if self.settings is not None:
            trainer.restore_adapters()

    def post_train(self, cfg: Any, model: Any) -> None:
        """Check that the reference is still what was attached; the host calls this twice."""
        stays = self.settings is not None and not self.settings.reference.strategy.moves
        if stays and isinstance(model, PolicyReferenceModel) and model.has_reference:
            check_reference_unchanged(model)


def load_base(loader: Any, theirs: Callable[[], Any]) -> Any:
    """Load the base of one of our runs; any other is the host's."""
    if loader.cfg.trainer_cls != TRAINER:
        return theirs()
    plugin = DPOPlugin.active()
    return base_model.load(loader, theirs, plugin.run_settings(), plugin.planned)


def settings_for_evaluation(cfg: Any, settings: RunSettings) -> RunSettings:
    """Let ``axolotl evaluate`` measure the DPO adapter against its reference, on our data.

    The evaluate of axolotl 0.19 to 0.21 asks no plugin for data (cli/evaluate.py:37), so its loader is replaced;
    tests/integration/test_host_commands.py fails when it asks.
    """
    running.use_trained_adapter(cfg, "evaluate")
    if cfg.get("adapter"):
        settings = replace(settings, policy=AdapterFolder.open(cfg["lora_model_dir"], "lora_model_dir"))
    for module in map(sys.modules.get, ("__main__", "axolotl.cli.evaluate")):
        theirs = getattr(module, "load_preference_datasets", None)
        if theirs is not None:

            def load(*, cfg: Any, cli_args: Any = None, theirs: Any = theirs) -> Any:
                return host_datasets.load_datasets(cfg, settings) or theirs(cfg=cfg, cli_args=cli_args)

            setattr(module, "load_preference_datasets", load)  # noqa: B010
    return settings


def check_host_memory(cfg: Mapping[str, Any], settings: RunSettings) -> None:
    """Refuse a run that moves weights or optimizer states to a host that cannot hold them.

    Raises:
        ConfigError: Naming the key and what it takes.
    """
    if not settings.engine.offloads:
        return
    from dpo_plugin.plan.planner import Planner, this_machine

    try:
        shortage = Planner(cfg, "this config", this_machine(), settings.config, settings.engine).host_shortage()
    except ConfigError as error:
        LOG.warning(f"dpo_plugin: whether the host's memory is enough for what is moved to it is not known: {error}")
        return
    if shortage:
        raise ConfigError(shortage)


def check_reference_unchanged(model: PolicyReferenceModel) -> None:
    """Raise if the reference adapter's bytes are not those that training began with; all ranks must call.

    Raises:
        AdapterError: Naming both digests.
    """
    now = reference_digest(model)
    if now != model.reference_digest:
        raise AdapterError(
            f"the reference adapter has changed during training: sha256 {model.reference_digest} before, {now} now. "
            "Another plugin or callback writes to it; remove that."
        )
