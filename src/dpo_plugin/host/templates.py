"""The chat template that a dataset entry is rendered with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.dict import DictDefault

from dpo_plugin.data.render import Renderer


def renderer_of(
    cfg: Mapping[str, Any], entry: Mapping[str, Any], tokenizer: Any, refuse_special_tokens: bool
) -> Renderer:
    """Make the renderer of one dataset entry; its template comes before the config's and the tokenizer's own.

    Args:
        cfg: `RunSettings.template`, or the host's config, which holds the same keys.
        entry: The entry.
        tokenizer: The tokenizer.
        refuse_special_tokens: Whether text that holds a control token is refused.
    """
    own = entry.get("chat_template") or ("jinja" if entry.get("chat_template_jinja") else None)
    choice = own or cfg.get("chat_template")
    return Renderer(
        tokenizer,
        get_chat_template_from_config(cfg, DictDefault({**entry, "chat_template": own}), tokenizer) if choice else None,
        name=f"chat_template {choice}" if choice else "the tokenizer's chat template",
        template_kwargs=cfg.get("chat_template_kwargs") or {},
        refuse_special_tokens=refuse_special_tokens,
    )
