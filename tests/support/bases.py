"""Tiny bases of the recipes' architectures, each with a tokenizer that has its base's special tokens and template."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.support import tiny

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip

# Config, model, special tokens by role, further special tokens, axolotl's name of the chat template. As in the
# tokenizer_config.json of Qwen/Qwen2.5-72B-Instruct, meta-llama/Llama-3.1-8B-Instruct,
# mistralai/Mistral-Nemo-Instruct-2407 and microsoft/phi-2; what is not named there (a pad token of Llama's and phi's) is
# missing here, too.
FAMILIES: dict[str, tuple[Any, Any, dict[str, str], list[str], str | None]] = {
    "Qwen": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ["<|im_start|>"],
        "qwen_25",
    ),
    "meta-llama": (
        LlamaConfig,
        LlamaForCausalLM,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eom_id|>", "<|python_tag|>"],
        "llama3",
    ),
    "mistralai": (
        MistralConfig,
        MistralForCausalLM,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"],
        "mistral_v3_tekken",
    ),
    "microsoft": (
        PhiConfig,
        PhiForCausalLM,
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        [],
        None,
    ),
}  # fmt: skip


@cache
def _bpe() -> str:
    """A byte-level BPE without special tokens, as JSON."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [message["content"] for chat in tiny.assets().conversations() for message in chat]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, show_progress=False))
    return str(bpe.to_str())


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """The tiny BPE with the special tokens and the template of a family, and no others."""
    from axolotl.utils.chat_templates import get_chat_template

    _, _, roles, more, template = FAMILIES[family]
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_bpe()), **roles)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in more])
    if "bos_token" in roles and family != "microsoft":
        bos = roles["bos_token"]
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.convert_tokens_to_ids(bos))]
        )
    made.chat_template = get_chat_template(template) if template else None
    return made


def save(family: str, folder: Path) -> Path:
    """Save a tiny model of a family with its tokenizer."""
    made = tokenizer(family)
    config, model, *_ = FAMILIES[family]
    torch.manual_seed(0)
    ids = {name: getattr(made, f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")}
    model(config(vocab_size=len(made), tie_word_embeddings=False, **SHAPE, **ids)).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
