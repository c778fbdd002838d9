"""DPO from an SFT LoRA adapter, for axolotl.

Add one line to an axolotl config: ``plugins: [dpo_plugin.DPOPlugin]``. Importing this package imports neither
torch nor axolotl; names are resolved on first use (PEP 562), and ``type: dpo_plugin.<format>`` in a dataset entry
finds the registered preference format of that name.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from pluggy import HookimplMarker

__version__ = "0.1.0"

hookimpl = HookimplMarker("dpo_plugin")

_LAZY = {
    "DPOPlugin": "dpo_plugin.host.plugin",
    "DPOPluginError": "dpo_plugin.errors",
    "DPOPluginConfig": "dpo_plugin.config",
    "Message": "dpo_plugin.types",
    "PairBatch": "dpo_plugin.types",
    "PairLogps": "dpo_plugin.types",
    "PreferencePair": "dpo_plugin.types",
    "ReferenceStrategy": "dpo_plugin.model.references",
}

__all__ = ["DPOPlugin", "__version__", "hookimpl", *sorted(_LAZY.keys() - {"DPOPlugin"})]


def __getattr__(name: str) -> Any:
    if name.startswith("__") or find_spec(f"{__name__}.{name}"):  # `from dpo_plugin import <submodule>` asks here first
        raise AttributeError(name)
    if name in _LAZY:
        try:
            value = getattr(import_module(_LAZY[name]), name)
        except ImportError as error:
            # axolotl prints an ImportError of a plugin and trains on without it (integrations/base.py, 0.19).
            from dpo_plugin.errors import DPOPluginError

            raise DPOPluginError(
                f"dpo_plugin.{name} cannot be imported: {error}. Reinstall with: pip install --upgrade dpo-plugin"
            ) from error
        globals()[name] = value
        return value
    from dpo_plugin.registry import get_registry

    formats = get_registry().formats
    if name in formats:
        from dpo_plugin.host.datasets import host_strategy

        return host_strategy(name)
    raise AttributeError(f"module 'dpo_plugin' has no attribute or preference format {name!r}")
