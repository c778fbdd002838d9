"""Tiny bases of the recipes' architectures, each with a tokenizer that has its base's special tokens and template."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.support import tiny

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip

VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
PROCESSOR = {
    "processor_class": "Gemma3Processor", "image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 4,
    "size": {"height": 28, "width": 28},
}  # fmt: skip

HARMONY = (
    "<|start|>system<|message|>You are ChatGPT.\nReasoning: medium<|end|>"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}<|start|>developer<|message|># Instructions\n\n{{ message.content }}<|end|>"
    "{% elif message.role == 'user' %}<|start|>user<|message|>{{ message.content }}<|end|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ message.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""The form of gpt-oss's own template, which axolotl does not ship: a last answer ends otherwise than earlier ones."""


class Family(NamedTuple):
    """What makes a base.

    Attributes:
        config: Class of the config.
        model: Class of the model.
        roles: Special tokens by role.
        more: Further special tokens.
        template: axolotl's name of the chat template, or a template; None for a base without one.
        settings: What the config needs besides `SHAPE`.
        end_of_turn: The token that ends an answer.
    """

    config: Any
    model: Any
    roles: dict[str, str]
    more: list[str]
    template: str | None
    settings: dict[str, Any]
    end_of_turn: str


MISTRAL_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
IMAGE_TOKENS = {
    "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"
}  # fmt: skip

# As in the tokenizer_config.json of Qwen/Qwen2.5-72B-Instruct, Qwen/Qwen3-30B-A3B-Instruct-2507,
# meta-llama/Llama-3.1-8B-Instruct, mistralai/Mistral-Nemo-Instruct-2407, mistralai/Mistral-Small-24B-Instruct-2501,
# microsoft/phi-2, google/gemma-3-12b-it and openai/gpt-oss-20b; what is not named there (a pad token of Llama's and
# phi's) is missing here, too.
FAMILIES = {
    "Qwen/Qwen2": Family(
        Qwen2Config,
        Qwen2ForCausalLM,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ["<|im_start|>"],
        "qwen_25",
        {},
        "<|im_end|>",
    ),
    "Qwen/Qwen3": Family(
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ["<|im_start|>"],
        "chatml",  # what the template of the Instruct models, which do not think, writes for text
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 8},
        "<|im_end|>",
    ),
    "meta-llama": Family(
        LlamaConfig,
        LlamaForCausalLM,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eom_id|>", "<|python_tag|>"],
        "llama3",
        {},
        "<|eot_id|>",
    ),
    "mistralai/Mistral-Nemo": Family(
        MistralConfig,
        MistralForCausalLM,
        MISTRAL_ROLES,
        ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"],
        "mistral_v3_tekken",
        {},
        "</s>",
    ),
    "mistralai/Mistral-Small": Family(
        MistralConfig,
        MistralForCausalLM,
        MISTRAL_ROLES,
        ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"],
        "mistral_v7_tekken",
        {"sliding_window": None, "head_dim": 8},
        "</s>",
    ),
    "microsoft": Family(
        PhiConfig,
        PhiForCausalLM,
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        [],
        None,
        {},
        "<|endoftext|>",
    ),
    "google": Family(
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
        ["<start_of_turn>", "<end_of_turn>"],
        "gemma3",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        "<end_of_turn>",
    ),
    "openai": Family(
        GptOssConfig,
        GptOssForCausalLM,
        {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>"],
        HARMONY,
        {"head_dim": 8, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        "<|return|>",
    ),
}  # fmt: skip
"""How a base's name begins → its family."""

QWEN72B = {
    "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
"""What the config.json of Qwen/Qwen2.5-72B-Instruct says of sizes."""


def family_of(base_model: str) -> str:
    """Find the key of `FAMILIES` that a recipe's base belongs to."""
    return next(name for name in FAMILIES if base_model.startswith(name))


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

    _, _, roles, more, template, *_ = FAMILIES[family]
    named = {"extra_special_tokens": IMAGE_TOKENS} if family == "google" else {}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_bpe()), **roles, **named)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in more])
    if "bos_token" in roles and family not in ("microsoft", "openai"):
        bos = roles["bos_token"]
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.convert_tokens_to_ids(bos))]
        )
    known = template is None or "{" in template
    made.chat_template = template if known else get_chat_template(template)
    return made


def save(family: str, folder: Path) -> Path:
    """Save a tiny model of a family with its tokenizer, and with its processor if it sees."""
    made = tokenizer(family)
    config, model, *_, settings, _ = FAMILIES[family]
    torch.manual_seed(0)
    ids = {name: getattr(made, f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")}
    sizes = {"vocab_size": len(made), "tie_word_embeddings": False, **SHAPE, **ids, **settings}
    if config is Gemma3Config:
        sizes = {"text_config": sizes, "vision_config": VISION, "mm_tokens_per_image": 4, "tie_word_embeddings": False}
        sizes |= {f"{name}_index": made.convert_tokens_to_ids(token) for name, token in IMAGE_TOKENS.items()}
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")
    model(config(**sizes)).save_pretrained(folder)
    if family == "openai":
        _to_mxfp4(folder)
    made.save_pretrained(folder)
    return folder


def _to_mxfp4(folder: Path) -> None:
    """Put random experts in MXFP4 in the place of a gpt-oss checkpoint's: 16 bytes of two codes, and a power of two."""
    file, packed = folder / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inside, outside = tensor.shape
            blocks = (experts, outside, inside // 32)
            packed[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8)
            packed[f"{name}_scales"] = torch.full(blocks, 127 - 6, dtype=torch.uint8)
        else:
            packed[name] = tensor
    save_file(packed, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
