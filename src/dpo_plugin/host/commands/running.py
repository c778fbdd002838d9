"""Which axolotl command is running, what ``lora_model_dir`` has to mean for it, and what ``merge-lora`` leaves out.

`lora_model_dir` names the SFT adapter. After training, though, ``axolotl merge-lora``, ``inference`` and ``evaluate``
on the same YAML are about the adapter in ``output_dir``; axolotl 0.19 to 0.21 prefers ``lora_model_dir``
(cli/merge_lora.py:258) and would merge the SFT adapter. tests/integration/test_host_commands.py holds each command.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from axolotl.loaders import load_tokenizer
from peft import PeftConfig
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from dpo_plugin.errors import AdapterError, ConfigError
from dpo_plugin.host.log import LOG

_HEAD = "base_model.model.lm_head.weight"

USES_TRAINED_ADAPTER = ("merge-lora", "inference", "evaluate")

ENGINE_KEYS = (
    "deepspeed", "fsdp", "fsdp_config", "fsdp_version", "tensor_parallel_size", "context_parallel_size",
    "sequence_parallel_degree", "dp_shard_size", "dp_replicate_size",
)  # fmt: skip
"""What splits a model over ranks."""


def running_command(cfg: Any) -> str:
    """``merge-lora``, ``inference``, ``evaluate`` or ``train``, from the config's flags and the started program."""
    if cfg.get("merge_lora"):
        return "merge-lora"
    if cfg.get("inference"):
        return "inference"
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    for command in USES_TRAINED_ADAPTER:
        if spec is not None and spec.name == f"axolotl.cli.{command.replace('-', '_')}":
            return command
    called_as_axolotl = Path(sys.argv[0]).name in ("axolotl", "axolotl.exe") and len(sys.argv) > 1
    return sys.argv[1] if called_as_axolotl and sys.argv[1] in USES_TRAINED_ADAPTER else "train"


def leave_out_engine(cfg: Any) -> None:
    """Let a command that runs on one process load the model whole, whatever the config trains with.

    ``axolotl merge-lora`` of axolotl 0.19 to 0.21 reads the config once before it takes ``deepspeed`` out of it
    (cli/merge_lora.py:224), and DeepSpeed then waits for other ranks.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        for key in ENGINE_KEYS:
            cfg.pop(key, None)
        if hasattr(cfg.get("dpo_plugin"), "pop"):
            cfg["dpo_plugin"].pop("loading", None)  # it is about engines


def intended_rl(cfg: Any) -> str:
    """``rl`` as the YAML says; ``axolotl inference`` removes it from the config that plugins see."""
    path = cfg.get("axolotl_config_path")
    if cfg.get("rl") is None and cfg.get("inference") and path and Path(path).is_file():
        return str((yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}).get("rl"))
    return str(cfg.get("rl"))


def use_trained_adapter(cfg: Any, command: str) -> None:
    """Point ``lora_model_dir`` at the DPO adapter in ``output_dir``, unless ``--lora-model-dir`` was given.

    Raises:
        ConfigError: If there is none.
    """
    named = any(word.split("=")[0].replace("_", "-") == "--lora-model-dir" for word in sys.argv)
    if named or not cfg.get("adapter"):
        return
    trained = Path(str(cfg.get("output_dir")))
    if not (trained / "adapter_config.json").is_file():
        raise ConfigError(
            f"`axolotl {command}` needs the DPO adapter, and `output_dir: {trained}` holds none. Train first, or name "
            "an adapter: --lora-model-dir <folder>"
        )
    LOG.info(f"dpo_plugin: {command} uses the DPO adapter in {trained}, not lora_model_dir {cfg.get('lora_model_dir')}")
    four_bit = cfg.get("adapter") == "qlora" or cfg.get("load_in_4bit")
    if command == "merge-lora" and four_bit and not is_on_parameters(trained):
        LOG.info(
            "dpo_plugin: the adapter was trained on an NF4 base; axolotl merges it into the base's weights after their "
            "NF4 round trip, and saves them in the base model's own precision"
        )
    cfg["lora_model_dir"] = str(trained)


# ── what merge-lora leaves out where an adapter brings new tokens, a head of its own, or LoRA on experts ──


def is_on_parameters(adapter: str | Path) -> bool:
    """Whether an adapter in a folder has ``target_parameters``."""
    return bool(getattr(PeftConfig.from_pretrained(str(adapter)), "target_parameters", None))


def complete_merges() -> None:
    """Let axolotl's merge end with the tokenizer that was trained with, and with all that was trained.

    axolotl 0.19 to 0.21 copies the base's tokenizer, without the config's ``tokens`` (cli/utils/lora_merge.py:929), and
    drops a head that the adapter trained apart from the embedding because a tied base has no tensor of that name
    (:3006).
    tests/integration/test_new_tokens.py fails without this.

    axolotl 0.19 to 0.21 drops LoRA on the parameters of experts where the base's files hold a tensor per expert, as
    those of Qwen3 (0.19) and Mixtral do (:974, "MERGE INCOMPLETE"); its other method leaves the merge to PEFT.
    tests/integration/test_expert_adapters.py fails without this.
    """
    for module in filter(None, map(sys.modules.get, ("__main__", "axolotl.cli.merge_lora"))):
        theirs = getattr(module, "do_merge_lora", None)
        if theirs is None or getattr(theirs, "completed", False):
            continue

        def merge(*, cfg: Any, theirs: Any = theirs) -> None:
            refuse_packed(cfg)
            head = separate_head(Path(cfg.lora_model_dir), cfg.base_model)
            if is_on_parameters(cfg.lora_model_dir):
                LOG.info(
                    f"dpo_plugin: {cfg.lora_model_dir} is on parameters, so PEFT merges it, in the base model's own "
                    "precision and with the whole model in memory (merge_method: legacy)"
                )
                cfg.merge_method = "legacy"
            theirs(cfg=cfg)
            merged = Path(cfg.output_dir) / "merged"
            load_tokenizer(cfg).save_pretrained(str(merged))
            if head is not None:
                untie(merged, head)

        merge.completed = True  # type: ignore[attr-defined]
        setattr(module, "do_merge_lora", merge)  # noqa: B010


def refuse_packed(cfg: Any) -> None:
    """Refuse to merge into a base whose experts are packed in MXFP4 (gpt-oss).

    axolotl 0.19 and 0.21 end without an error, and save a model without the experts' weights, whose logits are further
    off than the adapter moves them.

    Raises:
        ConfigError: For such a base.
    """
    packed = getattr(AutoConfig.from_pretrained(cfg.base_model), "quantization_config", None) or {}
    if packed.get("quant_method") == "mxfp4":
        raise ConfigError(
            f"`base_model: {cfg.base_model}` is in MXFP4, and axolotl would merge into a model without its experts. "
            f"Load the adapter beside the base instead: lora_model_dir: {cfg.lora_model_dir}"
        )


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
    """Give the merged model in a folder the head ``(vocabulary, hidden)`` of its adapter if its config ties its own."""
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
