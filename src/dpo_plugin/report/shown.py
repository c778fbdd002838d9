"""Which settings of a run may be shown to whoever reads its report: those that are known to hold no secret."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

_DATASET = (
    "path", "name", "split", "type", "ds_type", "data_files", "revision", "shards", "chat_template", "field_messages",
    "field_chosen", "field_rejected", "message_property_mappings", "roles",
)  # fmt: skip

_WHOLE = """
    base_model revision_of_model tokenizer_config overrides_of_model_config trust_remote_code special_tokens tokens
    chat_template load_in_4bit load_in_8bit bnb_config_kwargs
    adapter lora_model_dir lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_target_linear
    lora_modules_to_save lora_rank_pattern lora_alpha_pattern peft_use_dora peft_use_rslora peft_init_lora_weights
    loraplus_lr_ratio loraplus_lr_embedding unfrozen_parameters
    rl rl_beta dpo_loss_type dpo_loss_weights dpo_label_smoothing dpo_ld_alpha dpo_use_weighting
    precompute_ref_log_probs dpo_plugin
    val_set_size dataset_prepared_path sequence_len excess_length_strategy seed
    num_epochs max_steps micro_batch_size gradient_accumulation_steps eval_batch_size
    learning_rate lr_scheduler lr_scheduler_kwargs warmup_steps warmup_ratio optimizer weight_decay
    adam_beta1 adam_beta2 adam_epsilon max_grad_norm cosine_min_lr_ratio embedding_lr
    bf16 fp16 fp8 bfloat16 float16 float32 tf32 gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    attn_implementation flash_attention sdp_attention
    fsdp_config fsdp_version context_parallel_size tensor_parallel_size
    logging_steps eval_steps eval_strategy evals_per_epoch save_steps save_strategy saves_per_epoch save_total_limit
    metric_for_best_model greater_is_better load_best_model_at_end early_stopping_patience output_dir
"""
SHOWN: Mapping[str, tuple[str, ...] | None] = dict.fromkeys(_WHOLE.split()) | {
    "datasets": _DATASET,
    "test_datasets": _DATASET,
    "deepspeed": ("zero_optimization", "bf16", "fp16"),
}
"""Key of the YAML → which keys of its objects are shown, or None for all of them.

Left out is whatever may carry a key or a password: trackers, hubs, monitors of an engine, keys that are not known here.
"""


def shown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a YAML that are known to be harmless, addresses without user, password and query."""
    return {key: _shown(settings[key], SHOWN[key]) for key in SHOWN if settings.get(key) is not None}


def shown_text(text: str) -> str:
    """A path or address without what may be a secret in it: user and password before the host, the query, the home."""
    text = re.sub(r"(\w+://)(?:[^/\s]*@)?([^\s?#]*)(?:[?#]\S*)?", r"\1\2", text)
    home = os.environ.get("HOME", "").rstrip("/")
    return re.sub(rf"(?<![\w.~-]){re.escape(home)}(?=/|$)", "~", text) if home else text


def _shown(value: Any, keys: tuple[str, ...] | None) -> Any:
    if isinstance(value, Mapping):
        kept = {str(key): _shown(entry, None) for key, entry in value.items() if keys is None or key in keys}
        return {key: entry for key, entry in kept.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        return [_shown(entry, keys) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float)) else shown_text(str(value))
