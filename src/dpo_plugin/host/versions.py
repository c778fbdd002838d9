"""Whether the installed axolotl is one that was tested, and TRL one that has what is overridden here."""

from __future__ import annotations

from importlib.metadata import requires, version
from typing import Any

from packaging.requirements import Requirement

from dpo_plugin.config import asks_for_plugin
from dpo_plugin.errors import DPOPluginError
from dpo_plugin.host.log import LOG

LEANED_ON = (
    "_compute_loss", "_get_output_dir", "_load_best_model", "_load_from_checkpoint", "_load_optimizer_and_scheduler",
    "_prepare_dataset", "_prepare_for_training", "_prepare_inputs", "_run_epoch", "_save", "_save_checkpoint",
    "_save_optimizer_and_scheduler", "add_callback", "create_accelerator_and_postprocess", "create_model_card",
    "create_optimizer", "evaluate", "get_eval_dataloader", "get_train_dataloader", "is_world_process_zero", "log",
    "remove_callback", "save_model", "train", "training_step",
)  # fmt: skip
"""Methods of TRL's `DPOTrainer`, its own or transformers', that `PreferenceTrainer` takes over or calls: a missing one
would leave the host's in force without a word, or end a run in its middle."""

SETTINGS = (
    "beta", "disable_dropout", "label_smoothing", "loss_type", "loss_weights", "max_length", "pad_to_multiple_of",
    "precompute_ref_log_probs", "use_weighting",
)  # fmt: skip
"""Fields of TRL's own in `DPOConfig` that are read here."""


def check_versions() -> None:
    """Say once that an axolotl was not tested; refuse a TRL that would train something else.

    Raises:
        DPOPluginError: Naming TRL's version and those that serve.
    """
    pins = {pin.name: pin.specifier for pin in map(Requirement, requires("dpo-plugin") or []) if pin.marker is None}
    ours, axolotl = f"dpo_plugin {version('dpo-plugin')}", version("axolotl")
    if axolotl not in pins["axolotl"]:
        LOG.warning_once(
            f"dpo_plugin: axolotl {axolotl} was not tested with {ours}; axolotl{pins['axolotl']} was. "
            f"To get one of these: pip install 'axolotl{pins['axolotl']}'"
        )
    try:
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        missing = str(error)
    else:
        lacks = [name for name in LEANED_ON if not hasattr(DPOTrainer, name)]
        missing = ", ".join([*lacks, *(name for name in SETTINGS if name not in DPOConfig.__dataclass_fields__)])
    if missing:
        raise DPOPluginError(
            f"trl {version('trl')} on transformers {version('transformers')} lacks what {ours} builds on ({missing}); "
            f"trl{pins['trl']} has it. Write: pip install 'trl{pins['trl']}' 'transformers{pins['transformers']}'"
        )


def refusing_plugin(error: DPOPluginError) -> type[Any]:
    """Make the plugin that stands in for ours where it cannot be imported.

    axolotl 0.19 and 0.20 print an ImportError of a plugin and train on without it (integrations/base.py:421), as 0.21
    does with one that it found by itself (:487).

    Returns:
        A plugin that raises the error for a config that names ours, and does nothing for any other.
    """
    from axolotl.integrations.base import BasePlugin

    class RefusingPlugin(BasePlugin):  # type: ignore[misc]
        def register(self, cfg: Any) -> None:
            if asks_for_plugin(cfg):
                raise error

    return RefusingPlugin
