"""The store of reference log-probs of one run."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

from axolotl.integrations.base import PluginManager

from dpo_plugin.compute import attention, batching, head, logps
from dpo_plugin.host.settings import RunSettings
from dpo_plugin.model.cache import ReferenceLogpStore, store_key, weights_digest
from dpo_plugin.model.references import ReferenceStrategy


def open_store(settings: RunSettings, strategy: ReferenceStrategy, base: Any) -> ReferenceLogpStore | None:
    """The store for this base, reference, precision and code; None if the reference's log-probs are not kept.

    With ``precompute_ref_log_probs`` and ``cache: false`` they are kept in memory.
    """
    cfg = PluginManager.get_instance().cfg
    if not strategy.fixed or (settings.kept_in is None and not cfg.precompute_ref_log_probs):
        return None
    source = "".join(map(inspect.getsource, (attention, batching, head, logps)))
    key = store_key(
        base=base_identity(base),
        quantisation=[cfg.load_in_4bit, cfg.load_in_8bit, cfg.bnb_config_kwargs],
        reference=[settings.strategy_name, strategy.identity()],
        dtype=[str(cfg.torch_dtype), cfg.bf16, cfg.fp16],
        ld_alpha=settings.config.loss.ld_alpha,
        code=hashlib.sha256(source.encode()).hexdigest(),
    )
    return ReferenceLogpStore(settings.kept_in / "reference_logps" if settings.kept_in else None, key)


def base_identity(base: Any) -> str:
    """Digest of a local model folder, or name and commit of one from the hub."""
    folder = Path(str(base.config.name_or_path))
    if folder.is_dir():
        return weights_digest(folder)
    return f"{base.config.name_or_path}@{getattr(base.config, '_commit_hash', None)}"
