"""DPO from an SFT LoRA adapter, for axolotl.

Add one line to an axolotl config: ``plugins: [dpo_plugin.DPOPlugin]``. Importing this package imports neither
torch nor axolotl; names are resolved on first use (PEP 562).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_plugin.compute.loss_traits import LossTraits as LossTraits
    from dpo_plugin.compute.losses import LossOptions as LossOptions
    from dpo_plugin.config import DPOPluginConfig as DPOPluginConfig
    from dpo_plugin.config import PairsConfig as PairsConfig
    from dpo_plugin.config import ReferenceConfig as ReferenceConfig
    from dpo_plugin.data.formats import Columns as Columns
    from dpo_plugin.errors import DPOPluginError as DPOPluginError
    from dpo_plugin.errors import RowError as RowError
    from dpo_plugin.errors import ScorerError as ScorerError
    from dpo_plugin.health.history import History as History
    from dpo_plugin.hookspecs import hookimpl as hookimpl
    from dpo_plugin.host.plugin import DPOPlugin as DPOPlugin
    from dpo_plugin.metrics.pair import needs as needs
    from dpo_plugin.model.references import Forward as Forward
    from dpo_plugin.model.references import ReferenceStrategy as ReferenceStrategy
    from dpo_plugin.samples.scorers import BatchScorer as BatchScorer
    from dpo_plugin.samples.scorers import Candidate as Candidate
    from dpo_plugin.types import CompletionLogps as CompletionLogps
    from dpo_plugin.types import Finding as Finding
    from dpo_plugin.types import Message as Message
    from dpo_plugin.types import PairBatch as PairBatch
    from dpo_plugin.types import PairLogps as PairLogps
    from dpo_plugin.types import PreferencePair as PreferencePair
    from dpo_plugin.types import RenderedPair as RenderedPair

    __version__: str

_LAZY = {
    "BatchScorer": "dpo_plugin.samples.scorers",
    "Candidate": "dpo_plugin.samples.scorers",
    "Columns": "dpo_plugin.data.formats",
    "CompletionLogps": "dpo_plugin.types",
    "DPOPlugin": "dpo_plugin.host.plugin",
    "DPOPluginConfig": "dpo_plugin.config",
    "DPOPluginError": "dpo_plugin.errors",
    "Finding": "dpo_plugin.types",
    "Forward": "dpo_plugin.model.references",
    "History": "dpo_plugin.health.history",
    "LossOptions": "dpo_plugin.compute.losses",
    "LossTraits": "dpo_plugin.compute.loss_traits",
    "Message": "dpo_plugin.types",
    "PairBatch": "dpo_plugin.types",
    "PairLogps": "dpo_plugin.types",
    "PairsConfig": "dpo_plugin.config",
    "PreferencePair": "dpo_plugin.types",
    "ReferenceConfig": "dpo_plugin.config",
    "ReferenceStrategy": "dpo_plugin.model.references",
    "RenderedPair": "dpo_plugin.types",
    "RowError": "dpo_plugin.errors",
    "ScorerError": "dpo_plugin.errors",
    "hookimpl": "dpo_plugin.hookspecs",
    "needs": "dpo_plugin.metrics.pair",
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
