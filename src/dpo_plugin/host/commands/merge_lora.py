"""What ``axolotl merge-lora`` leaves out where an adapter brings new tokens or a head of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from axolotl.loaders import load_tokenizer
from peft import PeftConfig
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from dpo_plugin.errors import AdapterError

_HEAD = "base_model.model.lm_head.weight"


def complete_merges() -> None:
    """Let axolotl's merge end with the tokenizer that was trained with, and with the head that was trained.

    axolotl 0.19 copies the base's tokenizer, without the config's ``tokens`` (cli/utils/lora_merge.py:583), and drops
    a head that the adapter trained apart from the embedding because a tied base has no tensor of that name (:2233).
    tests/integration/test_new_tokens.py fails without this.
    """
    for module in filter(None, map(sys.modules.get, ("__main__", "axolotl.cli.merge_lora"))):
        theirs = getattr(module, "do_merge_lora", None)
        if theirs is None or getattr(theirs, "completed", False):
            continue

        def merge(*, cfg: Any, theirs: Any = theirs) -> None:
            head = separate_head(Path(cfg.lora_model_dir), cfg.base_model)
            theirs(cfg=cfg)
            merged = Path(cfg.output_dir) / "merged"
            load_tokenizer(cfg).save_pretrained(str(merged))
            if head is not None:
                untie(merged, head)

        merge.completed = True  # type: ignore[attr-defined]
        setattr(module, "do_merge_lora", merge)  # noqa: B010


def separate_head(adapter: Path, base: str) -> Tensor | None:
    """The head that an adapter holds whole, or None.

    Raises:
        AdapterError: If it holds the embedding alone, whose values the merged model's tied head would take over.
    """
    tensors: dict[str, Tensor] = load_peft_weights(str(adapter), device="cpu")
    alone = _HEAD not in tensors and any(key.endswith(".embed_tokens.weight") for key in tensors)
    tied_in_training = PeftConfig.from_pretrained(str(adapter)).ensure_weight_tying
    if alone and not tied_in_training and AutoConfig.from_pretrained(base).tie_word_embeddings:
        raise AdapterError(
            f"{adapter} holds an embedding of its own and no head. {base} ties the two, so that the merged model would "
            "have another head than the one trained with. Serve the adapter unmerged, or train again and write: "
            "lora_modules_to_save: [embed_tokens, lm_head]"
        )
    return tensors.get(_HEAD)


def untie(merged: Path, head: Tensor) -> None:
    """Give a merged model the head of its adapter if its config ties the head to the embedding.

    Args:
        merged: The folder of the merged model.
        head: ``(vocabulary, hidden)``.
    """
    file = merged / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if not config.get("tie_word_embeddings", False):
        return
    file.write_text(json.dumps({**config, "tie_word_embeddings": False}, indent=2), encoding="utf-8")
    shard = max(merged.glob("*.safetensors"))
    tensors = load_file(shard)
    dtype = next(iter(tensors.values())).dtype
    name = _HEAD.removeprefix("base_model.model.")
    save_file({**tensors, name: head.to(dtype).contiguous()}, shard, metadata={"format": "pt"})
    index = merged / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"][name] = shard.name
        index.write_text(json.dumps(content, indent=2), encoding="utf-8")
