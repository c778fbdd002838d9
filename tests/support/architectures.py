"""A tiny random model of every causal language model that axolotl packs (monkeypatch/multipack.py) and transformers has."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

WINDOW = 6
CHUNK = 16

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 4, "head_dim": None, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 1, **ROUTED,
}  # fmt: skip
SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
GRANITE = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": None}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "head_dim": None}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 16,
    **ROUTED,
}  # fmt: skip

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "apertus": {}, "arcee": {}, "llama": {}, "llama4_text": {"attention_chunk_size": CHUNK, "num_local_experts": 2},
    "mistral": {"sliding_window": WINDOW}, "ministral": {"sliding_window": WINDOW}, "ministral3": {},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4, **ROUTED},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16, **ROUTED},
    "qwen3": {}, "qwen3_moe": {"num_experts": 4, **ROUTED}, "falcon": {"head_dim": None, "num_kv_heads": 1},
    "phi": {"head_dim": None}, "phi3": {"head_dim": None, "sliding_window": WINDOW},
    "gemma": {}, "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {
        "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16,
        "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
    },
    "cohere": {}, "cohere2": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "starcoder2": {"head_dim": None, "sliding_window": WINDOW},
    "deepseek_v2": LATENT, "deepseek_v3": LATENT, "glm": {}, "glm4": {}, "glm4_moe": {**SHARED, **ROUTED},
    "glm4_moe_lite": LATENT, "smollm3": {}, "granite": {"logits_scaling": 4.0}, "granitemoe": GRANITE,
    "granitemoeshared": GRANITE, "hunyuan_v1_dense": {}, "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "gpt_oss": {
        "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "seed_oss": {}, "ernie4_5": {}, "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, **ROUTED},
    "olmo": {}, "olmo2": {}, "olmo3": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "afmoe": {"num_experts": 4, "num_dense_layers": 1, "sliding_window": WINDOW, **ROUTED},
    "nemotron": {}, "minimax_m2": {"num_local_experts": 4, **ROUTED}, "stablelm": {}, "gpt_neox": {"head_dim": None},
    "qwen3_next": LINEAR, "qwen3_5_text": LINEAR, "qwen3_5_moe_text": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {**GRANITE, **MAMBA, "layer_types": ["mamba", "attention"]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "head_dim": None, "use_mamba_kernels": False},
}  # fmt: skip
"""Model type → what its config needs beside `SIZES`; None takes a size away."""

WITH_STATE = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm2", "granitemoehybrid", "falcon_h1", "jamba")
"""Model types with layers that hand on a state from token to token."""


def make_config(kind: str, **settings: Any) -> Any:
    """Make the config of a tiny model."""
    sizes = {**SIZES, "vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    given = {**sizes, **ARCHITECTURES[kind], **settings}
    return AutoConfig.for_model(kind, **{name: value for name, value in given.items() if value is not None})


def make_model(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """Make a tiny model whose matrices are large enough that every token it attends to moves what it says."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(kind, **settings), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products take no fp64
    return model.train()
