"""The cache of reference log-probs of one run."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dpo_plugin.compute import attention, batching, logps
from dpo_plugin.compute import lm_head as head
from dpo_plugin.host.log import LOG
from dpo_plugin.host.settings import RunSettings
from dpo_plugin.model.cache import ReferenceLogpCache, cache_key, config_digest, rope_limit, weights_digest
from dpo_plugin.model.references import ReferenceStrategy


def open_cache(
    settings: RunSettings, strategy: ReferenceStrategy, base: str, config: Any, longest: Callable[[], int]
) -> ReferenceLogpCache | None:
    """Open the cache for this base, reference, precision and code; None if nothing is cached.

    With ``precompute_ref_log_probs`` and ``cache: false`` it lives in memory.

    Args:
        settings: The run's settings.
        strategy: The reference.
        base: The `base_identity`.
        config: The base model's config as loaded.
        longest: Gives the tokens of the longest row, padding included.
    """
    folder = settings.reference.cache_dir
    if not strategy.cacheable() or (folder is None and not settings.precompute):
        return None
    limit = rope_limit(config)
    if limit is not None and longest() > limit:
        LOG.warning(
            "dpo_plugin: reference log-probs are not kept. This model's rotary frequencies depend on the longest row "
            f"of a batch as soon as it has more than {limit} tokens, and so do the log-probs of all rows in it. To "
            f"keep them, write: sequence_len: {limit}"
        )
        return None
    source = "".join(map(inspect.getsource, (attention, batching, head, logps)))
    key = cache_key(
        base=base,
        numerics=settings.numerics,
        reference=[settings.reference.name, strategy.identity()],
        dtype=str(settings.engine.dtype),
        ld_alpha=settings.config.loss.ld_alpha,
        code=hashlib.sha256(source.encode()).hexdigest(),
    )
    return ReferenceLogpCache(folder / "reference_logps" if folder else None, key)


def rounding(dtype: torch.dtype) -> float:
    """Bound by how much two forwards of one model may differ in batches of other shapes: nats per √token.

    Eight times the spacing of the numbers that the run multiplies. 16-bit training and serving of one model differ by a
    Kullback-Leibler divergence of about 8e-4 nats a token in bf16 (arXiv 2510.26788), which is 0.04 in this unit.

    Args:
        dtype: `EngineSettings.dtype`.
    """
    return max(8 * torch.finfo(dtype).eps, 1e-3)


def base_identity(base: Any) -> str:
    """Hash the base model as loaded: its config, and a local folder's weights or its name and commit on the hub."""
    folder = Path(str(base.config.name_or_path))
    commit = f"{base.config.name_or_path}@{getattr(base.config, '_commit_hash', None)}"
    return cache_key(weights=weights_digest(folder) if folder.is_dir() else commit, config=config_digest(base.config))
