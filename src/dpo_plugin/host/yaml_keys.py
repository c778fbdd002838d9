"""The keys of axolotl's YAML that dpo_plugin looks at, each in its type, before the host has validated anything.

A key is as lenient as in the host's schema (numbers may be text, because YAML 1.1 reads ``1e-5`` as such), except where
the host lets nonsense through that fails later or trains something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from axolotl.utils.schemas.enums import ChatTemplate
from axolotl.utils.schemas.validation import ValidationMixin
from pydantic import AfterValidator, Field, Strict, ValidationError

from dpo_plugin.config import Role
from dpo_plugin.engines.config import DeepSpeed, fsdp_keys
from dpo_plugin.errors import ConfigError
from dpo_plugin.validation import Count, Folder, HostKeys, Integer, Name, Real, Text, Unset, message

DATA_SUFFIXES = {".json", ".jsonl", ".parquet", ".arrow", ".csv", ".txt"}


def _template(name: str) -> str:
    if name not in ChatTemplate.__members__ and not name.startswith("tokenizer_default_fallback_"):
        raise ValueError("should be one of axolotl's chat templates")
    return name


def _weights(weights: list[float]) -> list[float]:
    if not any(weights):
        raise ValueError("should have one above 0")
    return weights


def _data_path(path: str) -> str:
    """Refuse a folder whose files are not data: all of them would be read for its digest."""
    folder, here, home = Path(path).expanduser().resolve(), Path.cwd(), Path.home()
    holds_data = folder == here and any(file.suffix in DATA_SUFFIXES for file in folder.iterdir())
    if folder in (home, *home.parents, here, *here.parents) and not holds_data:
        raise ValueError("should be a data set, not a folder that holds everything")
    return path


class DatasetEntry(HostKeys):
    """An entry of ``datasets`` or ``test_datasets``."""

    path: Annotated[Text, AfterValidator(_data_path)] = Field(examples=["data/preferences.jsonl"])
    type: Text | dict[str, Any] | None = Field(None, examples=["dpo_plugin.chat"])
    data_files: Text | list[Text] | None = Field(None, examples=[["data/preferences.jsonl"]])
    ds_type: Literal["json", "csv", "parquet", "arrow", "text"] | None = Field(None, examples=["json"])
    name: Name = Field(None, examples=["default"])
    split: Name = Field(None, examples=["train"])
    revision: Name = Field(None, examples=["main"])
    field_messages: Name = Field(None, examples=["messages"])
    field_chosen: Name = Field(None, examples=["chosen"])
    field_rejected: Name = Field(None, examples=["rejected"])
    message_property_mappings: dict[Text, Text] | None = Field(None, examples=[{"role": "from", "content": "value"}])
    roles: dict[Role, list[Text]] | None = Field(None, examples=[{"user": ["human"]}])
    chat_template: Annotated[Text, AfterValidator(_template)] | None = Field(None, examples=["chatml"])
    chat_template_jinja: str | None = Field(None, examples=["template.jinja"])
    shards: Annotated[Integer, Field(ge=1, le=1)] | None = Field(None, examples=[1])


class FSDP(HostKeys):
    """``fsdp_config``, whose keys may have the prefix ``fsdp_``."""

    version: Integer | None = Field(None, examples=[2])
    fsdp_version: Integer | None = Field(None, examples=[2])
    offload_params: bool | None = Field(None, examples=[False])
    fsdp_offload_params: bool | None = Field(None, examples=[False])
    cpu_ram_efficient_loading: bool | None = Field(None, examples=[False])
    fsdp_cpu_ram_efficient_loading: bool | None = Field(None, examples=[False])


class RawConfig(HostKeys):
    """The top level."""

    plugins: list[Text] | None = Field(None, examples=[["dpo_plugin.DPOPlugin"]])
    base_model: Name = Field(None, examples=["Qwen/Qwen2.5-7B-Instruct"])
    base_model_config: Name = Field(None, examples=["Qwen/Qwen2.5-7B-Instruct"])
    revision_of_model: Name = Field(None, examples=["main"])
    trust_remote_code: bool | None = Field(None, examples=[False])
    adapter: Name = Field(None, examples=["lora"])
    load_in_4bit: bool | None = Field(None, examples=[True])
    load_in_8bit: bool | None = Field(None, examples=[False])
    bnb_config_kwargs: dict[str, Any] | None = Field(None, examples=[{"bnb_4bit_quant_type": "nf4"}])
    embeddings_skip_upcast: bool | None = Field(None, examples=[True])
    lora_model_dir: Name = Field(None, examples=["./SFT_LoRA"])
    lora_r: Count | None = Field(None, examples=[16])
    lora_alpha: Annotated[Real, Field(gt=0)] | None = Field(None, examples=[16])
    lora_target_linear: bool | None = Field(None, examples=[True])
    lora_target_modules: Text | list[Text] | None = Field(None, examples=[["q_proj", "v_proj"]])
    lora_target_parameters: list[Text] | None = Field(
        None, examples=[["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]]
    )
    lora_modules_to_save: list[Text] | None = Field(None, examples=[["embed_tokens", "lm_head"]])
    rl_beta: Real | None = Field(None, examples=[0.1])
    dpo_loss_type: Annotated[list[Text], Field(min_length=1)] | None = Field(None, examples=[["sigmoid"]])
    dpo_loss_weights: (
        Annotated[list[Annotated[Real, Field(ge=0)]], Field(min_length=1), AfterValidator(_weights)] | None
    ) = Field(None, examples=[[1.0]])
    dpo_label_smoothing: Real | None = Field(None, examples=[0.1])
    dpo_ld_alpha: Annotated[Real, Field(ge=0, le=1)] | None = Field(None, examples=[0.5])
    dpo_use_liger_kernel: bool | None = Field(None, examples=[False])
    datasets: list[DatasetEntry] | None = Field(
        None, examples=[[{"path": "data/preferences.jsonl", "type": "dpo_plugin.chat"}]]
    )
    test_datasets: list[DatasetEntry] | None = Field(
        None, examples=[[{"path": "data/held_out.jsonl", "type": "dpo_plugin.chat"}]]
    )
    val_set_size: Annotated[Real, Field(ge=0, lt=1)] | None = Field(None, examples=[0.05])
    dataset_prepared_path: Annotated[Folder | None, Unset] = Field(None, examples=["last_run_prepared"])
    output_dir: Annotated[Folder | None, Unset] = Field(None, examples=["./outputs/dpo"])
    chat_template: Annotated[Text, AfterValidator(_template)] | None = Field(None, examples=["chatml"])
    chat_template_kwargs: dict[str, Any] | None = Field(None, examples=[{"enable_thinking": False}])
    sequence_len: Count | None = Field(None, examples=[2048])
    micro_batch_size: Count | None = Field(None, examples=[1])
    gradient_accumulation_steps: Count | None = Field(None, examples=[16])
    num_epochs: Annotated[Real, Field(gt=0)] | None = Field(None, examples=[1])
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] | None = Field(None, examples=[42])
    optimizer: Name = Field(None, examples=["adamw_torch_fused"])
    gradient_checkpointing: bool | Text | None = Field(None, examples=[True])
    attn_implementation: Name = Field(None, examples=["sdpa"])
    torch_compile: bool | Text | None = Field(None, examples=[False])
    context_parallel_size: Annotated[Integer, Field(ge=0)] | None = Field(None, examples=[1])
    sequence_parallel_degree: Annotated[Integer, Field(ge=0)] | None = Field(None, examples=[1])
    # Strict, since the host compares text with a number (check_tensor_parallel_size_update_ds_json).
    tensor_parallel_size: Annotated[Integer, Strict(), Field(ge=0)] | None = Field(None, examples=[1])
    deepspeed: Annotated[Text | DeepSpeed | None, Unset] = Field(None, examples=["deepspeed_configs/zero3_bf16.json"])
    fsdp_version: Integer | None = Field(None, examples=[2])
    fsdp_config: FSDP | None = Field(None, examples=[{"version": 2, "reshard_after_forward": True}])


def typed(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Validate the keys of a raw config that are looked at; leave the others as they are.

    With ``fsdp_config`` there is a ``fsdp_version`` too: the one that the host takes where none is written.

    Raises:
        ConfigError: Naming the first key whose value cannot be what the key means, and the line to write.
    """
    try:
        read = RawConfig.model_validate({key: _plain(value) for key, value in cfg.items() if isinstance(key, str)})
        found = read.model_dump(exclude_unset=True)
    except ValidationError as error:
        raise ConfigError(message(error, RawConfig)) from error
    if found.get("fsdp_config"):
        asked = {"fsdp_version": found.get("fsdp_version"), "fsdp_config": fsdp_keys(found)}
        ValidationMixin.check_fsdp_version_in_fsdp_config(asked)
        found["fsdp_version"] = asked["fsdp_version"]
    return found


def _plain(value: Any) -> Any:
    """Without the host's DictDefault, whose every attribute is there and None, which pydantic takes for its own."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a config file that uses dpo_plugin.

    Raises:
        ConfigError: If it is not YAML, not keys and values, or does not name the plugin.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} cannot be read as YAML: {reason}. Write: plugins: [dpo_plugin.DPOPlugin]") from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{path} is a {type(found).__name__}, not keys with values. Write: plugins: [dpo_plugin.DPOPlugin]"
        )
    if "dpo_plugin.DPOPlugin" not in (typed(found).get("plugins") or []):
        raise ConfigError(f"{path} does not use dpo_plugin. Write: plugins: [dpo_plugin.DPOPlugin]")
    return found


LINES_OF_OTHERS = {
    "beta": "rl_beta: {}",
    "loss_type": "dpo_loss_type: [{}]",
    "loss_weights": "dpo_loss_weights: [{}]",
    "label_smoothing": "dpo_label_smoothing: {}",
    "use_weighting": "dpo_use_weighting: {}",
    "f_divergence_type": "dpo_plugin: {{loss: {{f_divergence: {}}}}}",
    "f_alpha_divergence_coef": "dpo_plugin: {{loss: {{f_alpha: {}}}}}",
    "ld_alpha": "dpo_plugin: {{loss: {{ld_alpha: {}}}}}",
    "router_aux_loss_coef": "dpo_plugin: {{loss: {{router_aux_loss_coef: {}}}}}",
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
"""Another library's name → the line that means the same here, with the given value in place of ``{}``."""


def check_names(cfg: Mapping[str, Any]) -> None:
    """Refuse settings under TRL's and transformers' names, which axolotl 0.19 to 0.21 drops from a YAML without a word.

    Raises:
        ConfigError: For the first such key.
    """
    for key, line in LINES_OF_OTHERS.items():
        if cfg.get(key) is None:
            continue
        given = str(cfg[key]).strip("[]'\" ")
        short = given if len(given) <= 60 else "…"
        raise ConfigError(
            f"`{key}: {short}` is the name in TRL's or another trainer's config; axolotl does not know it and would "
            f"leave it out. Write: {line.format('<value>' if short == '…' else short)}"
        )
