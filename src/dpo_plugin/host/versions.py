"""Whether the installed axolotl is one that was tested, and TRL one that has what is overridden here."""

from __future__ import annotations

from importlib.metadata import requires, version

from packaging.requirements import Requirement

from dpo_plugin.errors import DPOPluginError
from dpo_plugin.host.log import LOG

LEANED_ON = (
    "_compute_loss", "_prepare_dataset", "_precompute_ref_logps", "create_accelerator_and_postprocess",
    "_prepare_for_training", "_run_epoch", "_save_checkpoint", "_save_optimizer_and_scheduler", "_load_from_checkpoint",
    "_load_best_model",
)  # fmt: skip
"""Methods of TRL's `DPOTrainer`, its own or transformers', that `PreferenceTrainer` takes over: a missing one would
leave the host's in force without a word."""


def check_versions() -> None:
    """Say once that an axolotl was not tested; refuse a TRL that would train something else.

    Raises:
        DPOPluginError: Naming TRL's version and those that serve.
    """
    tested = {name: str(pin.specifier) for name, pin in _pins().items()}
    installed = {name: version(name) for name in ("axolotl", "trl", "transformers")}
    if installed["axolotl"] not in _pins()["axolotl"].specifier:
        LOG.warning_once(
            f"dpo_plugin: axolotl {installed['axolotl']} was not tested with dpo_plugin {version('dpo-plugin')}; "
            f"axolotl{tested['axolotl']} was. To get one of these: pip install 'axolotl{tested['axolotl']}'"
        )
    try:
        from trl import DPOTrainer
    except ImportError as error:
        missing = str(error)
    else:
        missing = ", ".join(name for name in LEANED_ON if not hasattr(DPOTrainer, name))
    if missing:
        raise DPOPluginError(
            f"trl {installed['trl']} on transformers {installed['transformers']} lacks what dpo_plugin "
            f"{version('dpo-plugin')} builds on ({missing}); trl{tested['trl']} has it. "
            f"Write: pip install 'trl{tested['trl']}' 'transformers{tested['transformers']}'"
        )


def _pins() -> dict[str, Requirement]:
    requirements = map(Requirement, requires("dpo-plugin") or [])
    return {requirement.name: requirement for requirement in requirements if requirement.marker is None}
