"""docs/settings.md, made of the schema of ``dpo_plugin:``: ``python -m tests.settings_page`` writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dpo_plugin.config import DPOPluginConfig
from tests.support.tiny import ROOT

PAGE = ROOT / "docs/settings.md"
HEAD = """\
# Settings: every key of `dpo_plugin:`

All are optional, and unknown keys and names are errors that list the known ones. What is not here is axolotl's:
`rl_beta`, `dpo_loss_type`, `sequence_len`, `datasets`, … keep their meaning. All keys are there since 0.1.0. This page is
made of the schema that reads the YAML (`python -m tests.settings_page`).

## At a glance

```yaml
dpo_plugin:
  reference:
    strategy: adapter         # adapter | base | model | ema | none | any registered
    adapter_dir: ./SFT_LoRA   # default: lora_model_dir
    cache: true               # keep its log-probs on disk; true (the default) | false | a folder
  data:
    columns: {chosen: best}   # column names, where they differ from the usual
    roles: {visitor: user}    # role names, beside human, gpt, bot and model
    truncation_side: right    # with excess_length_strategy: truncate; left cuts the prompt instead
    special_tokens: refuse    # rows whose text contains e.g. <|im_end|>; or allow
    sample_fraction: 1.0      # share of each data set
    max_bad_rows: 0.1         # share of unusable rows above which the run stops
  compute:
    prefix_sharing: auto      # what chosen and rejected begin with is computed once, without padding
    max_tokens: 8192          # most tokens in one forward; a larger micro-batch is split. Default: no limit
    checkpoint_layers: auto   # checkpoint as few layers as memory allows; or a number. Default: all
    logits_chunk: 256         # completion tokens whose logits are held at a time. Default: 64 MiB of them
    master_weights: true      # full fine-tuning in bf16: the optimizer updates fp32 copies of the weights
  loss:
    f_divergence: reverse_kl  # or forward_kl, js_divergence, alpha_divergence (f_alpha)
    ld_alpha: 1.0             # LD-DPO's weight of the longer answer's tail
  health:
    action: warn              # or stop (save and stop the run), off
    checks: {overfitting: stop}   # another action for single checks
  samples:                    # answers of policy and reference during training; without the section, none
    every_steps: 100
    prompts: prompts.jsonl    # default: those of the evaluation data
    scorer: rule              # judges them: samples/win_rate in the log; default: none
  pairs:                      # axolotl dpo pairs: answers of the model itself, scored and paired
    scorer: rule              # or length, command, reward_model, any registered
  loading: sharded            # a 4-bit base goes onto the GPUs of ZeRO-3 or FSDP2 layer by layer (the default) | host
  report: true                # report.html at the end
  metrics: [logratios/margin_per_token]   # default: all registered
```

Leave axolotl's `attn_implementation` out: an attention that is asked for by name is used, and prefixes are then not shared (but
with `eager`).
"""
WORDS = {str: "text", bool: "true or false", int: "whole number", float: "number"}
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}


def page() -> str:
    return "\n".join([HEAD, *(line for part in sections(DPOPluginConfig, "dpo_plugin") for line in part)])


def sections(model: type[BaseModel], name: str) -> Iterator[list[str]]:
    """The table of a section's own keys, then those of the sections in it."""
    own, inner = [], []
    for key, field in model.model_fields.items():
        if (kind := section_of(field.annotation)) is not None:
            inner.append((kind, f"{name}.{key}"))
        else:
            own.append(row(key, field))
    text = model.__doc__ if name != "dpo_plugin" else "Keys that stand in the section itself."
    if own:
        yield [
            f"## `{name}`\n",
            f"{text}\n".replace("``", "`"),
            "| key | type | default | meaning |",
            "|---|---|---|---|",
            *own,
            "",
        ]
    for kind, path in inner:
        yield from sections(kind, path)


def section_of(annotation: Any) -> type[BaseModel] | None:
    found = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next((kind for kind in found if issubclass(kind, BaseModel)), None)


def row(key: str, field: FieldInfo) -> str:
    kind = ", ".join([type_of(field.annotation), *bounds(field.metadata)])
    default = (
        "" if field.is_required() or field.get_default(call_default_factory=True) in (None, {}) else written(field)
    )
    cells = (f"`{key}`", kind, default, str(field.description))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def written(field: FieldInfo) -> str:
    return f"`{json.dumps(field.get_default(call_default_factory=True), ensure_ascii=False)}`".replace('"', "")


def bounds(metadata: list[Any]) -> list[str]:
    return [text.format(getattr(one, name)) for one in metadata for name, text in BOUNDS.items() if hasattr(one, name)]


def type_of(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return ", ".join([type_of(inside[0]), *(one for part in inside[1:] for one in bounds_of(part))])
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in inside)
    if origin in (Union, UnionType):
        return " or ".join(type_of(one) for one in inside if one is not type(None))
    if origin is dict:
        return f"{type_of(inside[0])} → {type_of(inside[1])}"
    if origin is list:
        return f"list of {type_of(inside[0])}"
    return WORDS[annotation]


def bounds_of(part: Any) -> list[str]:
    return bounds(list(part.metadata)) if isinstance(part, FieldInfo) else bounds([part])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
