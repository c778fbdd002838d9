"""An adapter on disk, in a folder or in the hub's cache, checked before weights are read.

PEFT checks no types in ``adapter_config.json``, ignores unknown keys, and fills in what is missing.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import LoraConfig
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from dpo_plugin.errors import AdapterError, ConfigError
from dpo_plugin.model.target_parameters import as_list, check_saved_parameters

_KNOWN = {field for field in LoraConfig.__dataclass_fields__ if not field.startswith("_")} | {"peft_type"}


def _scales(value: float) -> float:
    if value == 0:
        raise ValueError("0 would switch the adapter off")
    return value


_Rank = Annotated[int, Field(gt=0)]
_Alpha = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_scales)]  # takes integers as well
_Names = list[str] | str | None


class _LoraSettings(BaseModel):
    """The keys that decide what the adapter computes, with PEFT's types."""

    model_config = ConfigDict(extra="allow", strict=True)

    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: _Rank
    lora_alpha: _Alpha
    target_modules: _Names
    target_parameters: list[str] | None = None
    exclude_modules: _Names = None
    modules_to_save: _Names = None
    rank_pattern: dict[str, _Rank] = {}
    alpha_pattern: dict[str, _Alpha] = {}
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    use_rslora: bool | None = False
    use_dora: bool | None = False
    fan_in_fan_out: bool | None = False  # axolotl 0.19 to 0.21 writes null (loaders/adapter.py:207)
    lora_bias: bool | None = False
    layers_to_transform: list[int] | int | None = None
    layers_pattern: _Names = None
    alora_invocation_tokens: list[int] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


def _read_config(file: Path) -> dict[str, Any]:
    """Read an ``adapter_config.json`` and, of a LoRA, check that PEFT would use it as written."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"{file} cannot be read ({error.strerror}). Save the adapter again.") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is not valid JSON ({str(error)[:100]}). Save the adapter again.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file} holds no settings but {str(config)[:60]!r}. Save the adapter again.")
    if config.get("peft_type") != "LORA":
        return config
    for key in sorted(config.keys() - _KNOWN):
        if meant := difflib.get_close_matches(key.lower(), _KNOWN - config.keys(), n=1, cutoff=0.85):
            raise AdapterError(f"{file} has `{key}` where PEFT writes `{meant[0]}`. Save the adapter again.")
    try:
        _LoraSettings.model_validate(config)
        LoraConfig.from_pretrained(str(file.parent))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        found = f"{str(problem['input'])[:60]!r}: {problem['msg']}"
        raise AdapterError(f"{file}: `{key}` cannot be {found}. Save the adapter again.") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{file} cannot be used: {str(error)[:200]}. Save the adapter again.") from error
    return config


def _check_supported(config: Mapping[str, Any], key: str, folder: Path) -> None:
    """Check that policy and reference can be adapters of this kind on one base."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"`{key}: {folder}` is a {kind} adapter. Only LoRA is supported: policy and reference share one base. "
            f"Write: {key}: <folder of a LoRA adapter>"
        )
    _check_saved_init(config.get("init_lora_weights"), key, folder)
    merge = "Merge it into the base and write: adapter: lora, without lora_model_dir"
    if (bias := config.get("bias", "none")) != "none":
        raise AdapterError(
            f"`{key}: {folder}` trains biases (bias: {bias}), which live in the base model that policy and reference "
            f"share. {merge}"
        )
    check_saved_parameters(config, key, folder)


_SUBTRACTED = ("pissa", "olora", "corda", "lora_ga")
"""Values (or how they begin) of ``init_lora_weights`` with which PEFT 0.20 and 0.21 subtract the start, s·B₀A₀, from
the base's weights, which policy and reference share: each added adapter subtracts it again (tuners/lora/layer.py,
``update_layer``)."""


def _check_saved_init(init: Any, key: str, path: Path) -> None:
    """Check by its ``init_lora_weights`` that a saved adapter was trained on the base that is on disk.

    PEFT's own ``from_pretrained`` initialises it again, which gives the trained model back only if that start is
    deterministic: ``pissa_niter_4`` came out 1.2 nats off on 14 tokens, CorDA is an error, LoRA-GA subtracts nothing.
    """
    if init == "loftq":
        raise AdapterError(
            f"`{key}: {path}` has init_lora_weights: loftq and was trained on a base that LoftQ had rounded. Merge it "
            "with PEFT: PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(<merged>). "
            "Write: base_model: <merged>, without lora_model_dir"
        )
    if str(init).lower().startswith(_SUBTRACTED):
        raise AdapterError(
            f"`{key}: {path}` has init_lora_weights: {init}, and its start is to be subtracted from the base, once for "
            "each adapter. Convert it to plain LoRA with PEFT: model.save_pretrained(<plain>, path_initial_model_for_"
            f"weight_conversion=<the adapter before training>). Write: {key}: <plain>"
        )


def check_fresh_init(init: Any) -> None:
    """Check how a fresh LoRA is to be initialised.

    Raises:
        ConfigError: If the base would be changed, which is the reference.
    """
    if str(init).lower().startswith((*_SUBTRACTED, "loftq")):
        key = "peft.loftq_config" if init == "loftq" else "peft_init_lora_weights"
        raise ConfigError(
            f"`{key}` asks for a fresh LoRA of kind {init}, which changes the base model, and the base "
            f"is its reference. Write: {key}: null"
        )


_NEUTRAL = (
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "revision", "target_modules", "task_type",
)  # fmt: skip
"""Keys of an ``adapter_config.json`` that do not change what an adapter with given tensors computes."""


def adapter_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Select the settings that change what an adapter's tensors compute: rank, alpha, their patterns, DoRA, ….

    PEFT's defaults are left out, so that the config of another PEFT version, which has other keys, compares equal.
    """
    usual = LoraConfig().to_dict()
    told = {
        name: value for name, value in config.items() if name not in _NEUTRAL and value and value != usual.get(name)
    }
    if names := told.get("target_parameters"):
        told["target_parameters"] = sorted(names)  # PEFT makes a set of the list
    facts = {**told, "r": config.get("r"), "lora_alpha": config.get("lora_alpha")}
    return dict(json.loads(json.dumps(facts, default=str)))


def adapter_facts(config: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, Any]:
    """Collect an adapter's settings and, from the keys of its tensors, the modules that it sits on."""
    modules = [key.partition(".lora_")[0].replace(".base_layer", "") for key in tensors if ".lora_" in key]
    targets = sorted({name.rpartition(".")[2] for name in modules})
    return {**adapter_settings(config), "lora_target_modules": targets, "lora_tensors": len(modules)}


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk, read without loading its weights.

    Attributes:
        path: Folder with ``adapter_config.json``.
        config: Its contents.
        key: The YAML key that named it, for messages.
    """

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    key: str

    @property
    def parameters(self) -> list[str]:
        """Its ``target_parameters``."""
        return self.config.get("target_parameters") or []

    @classmethod
    def open(cls, path: str | Path, key: str) -> AdapterFolder:
        """Read the config of an adapter folder.

        Raises:
            AdapterError: If a file is missing or damaged, or policy and reference cannot share a base with it.
        """
        folder, line = Path(path).expanduser(), key.rpartition(".")[2]
        if not folder.is_dir():
            raise AdapterError(f"`{key}: {path}` does not exist. Write: {line}: <folder with adapter_config.json>")
        file = folder / "adapter_config.json"
        if not file.is_file():
            inside = sorted(child.parent.name for child in folder.glob("*/adapter_config.json"))
            hint = f"{folder / inside[-1]}" if inside else "<folder with adapter_config.json>"
            raise AdapterError(f"`{key}: {path}` holds no adapter_config.json. Write: {line}: {hint}")
        config = _read_config(file)
        _check_supported(config, key, folder)
        weights = folder / "adapter_model.safetensors"
        if weights.is_file():
            try:
                with safe_open(weights, framework="pt"):
                    pass
            except SafetensorError as error:
                raise AdapterError(f"{weights} is damaged or cut off ({error}). Save the adapter again.") from error
        elif not weights.with_suffix(".bin").is_file():
            raise AdapterError(f"`{key}: {path}` holds no {weights.name}. Save the adapter again.")
        return cls(folder, config, key)


def open_adapter(path: str, key: str) -> AdapterFolder:
    """The adapter in a folder, or else in the repository ``<owner>/<name>``, fetched into the hub's cache.

    Raises:
        AdapterError: If there is neither, the hub cannot be reached, or the adapter cannot be used.
    """
    if Path(path).expanduser().exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        return AdapterFolder.open(path, key)
    try:
        folder = snapshot_download(path, allow_patterns=["adapter_config.json", "adapter_model.*"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        offline = constants.HF_HUB_OFFLINE or isinstance(error, LocalEntryNotFoundError)
        why = "is not in the hub's cache, and the hub is not reached from here" if offline else "is not on the hub"
        unset = "; HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        raise AdapterError(
            f"`{key}: {path}` does not exist as a folder and {why} ({type(error).__name__}{unset}). "
            f"Fetch it with `hf download {path}` where there is a network, or write: {key.rpartition('.')[2]}: <folder "
            "with adapter_config.json>"
        ) from error
    return AdapterFolder.open(folder, key)


def check_equal_parameters(policy: AdapterFolder | None, asked: Iterable[str] | None, reference: AdapterFolder) -> None:
    """Check that policy and reference, if both are adapters on parameters, name the same ones.

    Args:
        policy: The folder that the policy starts from, or None for a fresh LoRA.
        asked: ``lora_target_parameters`` of a fresh LoRA.
        reference: The folder of the reference.

    Raises:
        ConfigError: Naming both sets.
    """
    mine, theirs = (sorted(names or ()) for names in (policy.parameters if policy else asked, reference.parameters))
    if not mine or not theirs or mine == theirs:
        return
    owner = f"the policy in {policy.path}" if policy else "the policy's `lora_target_parameters`"
    line = f"adapter_dir: <an adapter on {as_list(mine)}>" if policy else f"lora_target_parameters: {as_list(theirs)}"
    raise ConfigError(
        f"`{reference.key}: {reference.path}` is on the parameters {as_list(theirs)}, {owner} on {as_list(mine)}. PEFT "
        f"takes two such adapters on one base if they name the same parameters. Write: {line}"
    )
