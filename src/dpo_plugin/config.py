"""The ``dpo_plugin:`` section of an axolotl config; every key is optional, unknown keys are errors."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dpo_plugin.errors import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReferenceConfig(_Section):
    """Where the reference's log-probs come from."""

    strategy: str | None = Field(
        default=None,
        description="adapter, base, model, or any registered reference strategy. Default: adapter if lora_model_dir "
        "is set, base for a fresh LoRA, model for full fine-tuning.",
    )
    adapter_dir: str | None = Field(
        default=None,
        description="Folder of the frozen reference adapter, for strategy: adapter. Default: lora_model_dir.",
    )


class DPOPluginConfig(_Section):
    """The whole section."""

    reference: ReferenceConfig = Field(default_factory=ReferenceConfig, description="The reference policy.")
    metrics: list[str] | None = Field(
        default=None,
        description="Names of registered metrics to log beside the usual ones. Default: all registered.",
    )


class DPOPluginArgs(BaseModel):
    """What is mixed into axolotl's config schema: one nested key, so that nothing of the host's is shadowed."""

    dpo_plugin: DPOPluginConfig | None = Field(default=None, description="Settings of dpo_plugin.")


def parse_config(section: Any) -> DPOPluginConfig:
    """Read the ``dpo_plugin:`` section.

    Args:
        section: The raw value from the YAML; None means all defaults.

    Raises:
        ConfigError: Naming the key, and for an unknown key the known ones.
    """
    try:
        return DPOPluginConfig.model_validate(section or {})
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from error


def _explain(problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(["dpo_plugin", *path])
    if problem["type"] != "extra_forbidden":
        return f"`{key}`: {problem['msg']} (found {problem['input']!r})"
    known = _keys_at(path[:-1])
    close = difflib.get_close_matches(path[-1], known, n=1)
    return f"unknown key `{key}`. Known: {', '.join(known)}. Write: {(close or known)[0]}: …"


def _keys_at(path: list[str]) -> list[str]:
    model: type[BaseModel] = DPOPluginConfig
    for part in path:
        annotation = model.model_fields[part].annotation
        assert isinstance(annotation, type)
        model = annotation
    return sorted(model.model_fields)
