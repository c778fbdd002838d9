"""Settings under TRL's and transformers' names, which axolotl 0.19 drops from a YAML without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_plugin.errors import ConfigError

LINES = {
    "beta": "rl_beta: {}",
    "loss_type": "dpo_loss_type: [{}]",
    "loss_weights": "dpo_loss_weights: [{}]",
    "label_smoothing": "dpo_label_smoothing: {}",
    "use_weighting": "dpo_use_weighting: {}",
    "f_divergence_type": "dpo_plugin: {{loss: {{f_divergence: {}}}}}",
    "f_alpha_divergence_coef": "dpo_plugin: {{loss: {{f_alpha: {}}}}}",
    "ld_alpha": "dpo_plugin: {{loss: {{ld_alpha: {}}}}}",
    "discopop_tau": "dpo_plugin: {{loss: {{discopop_tau: {}}}}}",
    "max_length": "sequence_len: {}",
    "max_prompt_length": "sequence_len: <tokens of prompt and completion>",
    "max_completion_length": "sequence_len: <tokens of prompt and completion>",
    "truncation_mode": "dpo_plugin: {{data: {{truncation_side: right}}}}",
    "ref_model": "dpo_plugin: {{reference: {{strategy: adapter}}}}",
    "reference_free": "dpo_plugin: {{reference: {{strategy: none}}}}",
    "ref_adapter_name": "dpo_plugin: {{reference: {{adapter_dir: <folder of the adapter>}}}}",
    "rl_adapter_ref_model": "dpo_plugin: {{reference: {{adapter_dir: <folder of the adapter>}}}}",
    "model_adapter_name": "lora_model_dir: <folder of the adapter>",
    "sync_ref_model": "dpo_plugin: {{reference: {{strategy: ema}}}}",
    "ref_model_mixup_alpha": "dpo_plugin: {{reference: {{strategy: ema, ema_alpha: {}}}}}",
    "ref_model_sync_steps": "dpo_plugin: {{reference: {{strategy: ema, ema_steps: {}}}}}",
    "model_name_or_path": "base_model: {}",
    "per_device_train_batch_size": "micro_batch_size: {}",
    "per_device_eval_batch_size": "eval_batch_size: {}",
    "num_train_epochs": "num_epochs: {}",
    "lr_scheduler_type": "lr_scheduler: {}",
    "optim": "optimizer: {}",
    "dataset_name": "datasets: [{{path: {}, type: dpo_plugin.chat}}]",
}
"""Another library's name → the line that means the same here, with the value that was given in place of ``{}``."""


def check_names(cfg: Mapping[str, Any]) -> None:
    """Refuse what would be dropped.

    Raises:
        ConfigError: For the first such key.
    """
    for key, line in LINES.items():
        if cfg.get(key) is None:
            continue
        given = str(cfg[key]).strip("[]'\" ")
        short = given if len(given) <= 60 else "…"
        raise ConfigError(
            f"`{key}: {short}` is the name in TRL's or another trainer's config; axolotl does not know it and would "
            f"leave it out. Write: {line.format('<value>' if short == '…' else short)}"
        )
