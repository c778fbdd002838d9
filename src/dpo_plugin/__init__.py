"""DPO from an SFT LoRA adapter, for axolotl.

Add one line to an axolotl config: ``plugins: [dpo_plugin.DPOPlugin]``. Importing this package imports neither
torch nor axolotl; names are resolved on first use (PEP 562).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_plugin.config import DPOPluginConfig as DPOPluginConfig
    from dpo_plugin.errors import DPOPluginError as DPOPluginError
    from dpo_plugin.hookspecs import hookimpl as hookimpl
    from dpo_plugin.host.plugin import DPOPlugin as DPOPlugin
    from dpo_plugin.model.references import ReferenceStrategy as ReferenceStrategy
    from dpo_plugin.types import Message as Message
    from dpo_plugin.types import PairBatch as PairBatch
    from dpo_plugin.types import PairLogps as PairLogps
    from dpo_plugin.types import PreferencePair as PreferencePair

    __version__: str

_LAZY = {
    "DPOPlugin": "dpo_plugin.host.plugin",
    "DPOPluginConfig": "dpo_plugin.config",
    "DPOPluginError": "dpo_plugin.errors",
    "Message": "dpo_plugin.types",
    "PairBatch": "dpo_plugin.types",
    "PairLogps": "dpo_plugin.types",
    "PreferencePair": "dpo_plugin.types",
    "ReferenceStrategy": "dpo_plugin.model.references",
    "hookimpl": "dpo_plugin.hookspecs",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("dpo-plugin")
    if name not in _LAZY:
        raise AttributeError(f"module 'dpo_plugin' has no attribute {name!r}")
    try:
        globals()[name] = value = getattr(importlib.import_module(_LAZY[name]), name)
    except ImportError as cause:
        from dpo_plugin.errors import DPOPluginError

        error = DPOPluginError(
            f"dpo_plugin.{name} cannot be imported: {cause}. Reinstall with: pip install --upgrade dpo-plugin"
        )
        if name != "DPOPlugin":
            raise error from cause
        from dpo_plugin.host.versions import refusing_plugin

        return refusing_plugin(error)
    return value
