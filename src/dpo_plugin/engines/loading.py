"""How a 4-bit base gets onto the GPUs that ZeRO-3 or FSDP2 shards it over: whole, or layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_plugin.engines.config import EngineSettings
from dpo_plugin.errors import ConfigError


@dataclass(frozen=True)
class Loading:
    """Whether every rank maps a copy of the base in 4 bits and its engine takes it from there layer by layer.

    Attributes:
        asked: Whether the YAML asks for it, so that it is an error where it cannot be.
        blocker: Why the host loads the base in its own way, or None.
    """

    asked: bool
    blocker: str | None

    @property
    def sharded(self) -> bool:
        """Whether the base is loaded layer by layer."""
        return self.blocker is None

    @classmethod
    def choose(cls, wanted: str | None, cfg: Mapping[str, Any], engine: EngineSettings) -> Loading:
        """Decide by the config alone.

        Args:
            wanted: ``dpo_plugin.loading``.
            cfg: The raw YAML.
            engine: Of the run.

        Raises:
            ConfigError: For ``loading: sharded`` where it cannot be.
        """
        why = "`dpo_plugin.loading: host` asks for it" if wanted == "host" else _blocker(cfg, engine)
        if why and wanted == "sharded":
            raise ConfigError(f"`dpo_plugin.loading: sharded` is asked for, but {why}. Write: loading: host")
        return cls(wanted == "sharded", why)


def _blocker(cfg: Mapping[str, Any], engine: EngineSettings) -> str | None:
    """Why a base cannot be loaded layer by layer from a copy in 4 bits, as far as the config tells."""
    if not engine.shards_parameters:
        return f"{engine.label} keeps the whole base on each GPU"
    if cfg.get("adapter") != "qlora" or not cfg.get("load_in_4bit"):
        return "only a base in 4 bits is kept as a copy; the engine itself reads other bases in parts"
    reasons = {
        "quantize_moe_experts": "experts are quantised by the host, in a form that is not stored",
        "trust_remote_code": "the model's code is not the library's",
        "reinit_weights": "the weights are drawn anew in every run",
    }
    return next((f"`{key}: true`: {why}" for key, why in reasons.items() if cfg.get(key)), None)
