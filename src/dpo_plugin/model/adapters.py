"""One base model with two LoRA adapters: the trainable policy and the frozen reference.

PEFT switches adapters by walking every module and flipping ``requires_grad``, each time a chance to train the
reference. Its layers, however, only *read* a list of active adapter names. Here all layers share one list, so that
switching is one assignment, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.save_and_load import load_peft_weights
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from dpo_plugin.errors import AdapterError
from dpo_plugin.model.adapter_config import AdapterFolder, adapter_settings, check_fresh_init
from dpo_plugin.model.target_parameters import as_attached, check_expert_count, check_present, whole_shapes

# PEFT saves the adapter called "default" into the folder itself and any other into a folder of its own.
POLICY = "default"
REFERENCE = "reference"

_T = TypeVar("_T")

_PEFT_ERRORS = (AttributeError, ImportError, LookupError, RuntimeError, SafetensorError, TypeError, ValueError)
"""What PEFT raises for an adapter that does not fit or is damaged."""


class PolicyReferenceModel(PeftModelForCausalLM):  # type: ignore[misc]
    """A PEFT model whose adapter ``default`` is trained and whose adapter ``reference``, if any, is frozen.

    Attributes:
        digests: Adapter name → SHA-256 of its tensors as attached.
        reference_digest: The same of the reference as the engine holds it, which may have cast it to another dtype.
        starts_as_base: Whether the policy is a fresh LoRA that adds nothing yet.
    """

    digests: dict[str, str]
    reference_digest: str | None
    starts_as_base: bool

    @property
    def has_reference(self) -> bool:
        """Whether a reference adapter is attached."""
        return REFERENCE in self.peft_config

    def bind_switch(self) -> None:
        """Let every adapter layer read one shared list of active adapters; call once all adapters are attached."""
        self._active_names = [POLICY]
        self._switched = [m for m in self.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        for module in self._switched:
            module._active_adapter = self._active_names

    @contextmanager
    def _active(self, names: list[str]) -> Iterator[None]:
        if self._switched and self._switched[-1]._active_adapter is not self._active_names:
            raise AdapterError(
                "another library has called set_adapter on the model, which separates its layers from the policy/"
                "reference switch. Remove that call; dpo_plugin switches adapters itself."
            )
        self._active_names[:] = names
        try:
            yield
        finally:
            self._active_names[:] = [POLICY]

    def reference_active(self) -> Any:
        """Context in which the model is the reference; touches no parameter, hook or module."""
        return self._active([REFERENCE])

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Context in which the model is the base; by PEFT's own flag too, since other forwards of its layers read that.

        axolotl's ``lora_*_kernel``, which 0.21 attaches to this model, look for a first active adapter without it
        (kernels/lora.py:156).
        """
        with self._active([]):
            self._disable(True)
            try:
                yield
            finally:
                self._disable(False)

    def _disable(self, disabled: bool) -> None:
        for module in self._switched:
            module._disable_adapters = disabled

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of all adapters, modules_to_save included."""
        parts = (".lora_", ".modules_to_save.", ".trainable_tokens_")
        return ((name, p) for name, p in self.named_parameters() if any(part in name for part in parts))

    def policy_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the policy adapter, modules_to_save included."""
        return ((name, p) for name, p in self.adapter_parameters() if f".{POLICY}." in f"{name}.")

    def train_only_policy(self, trainable: bool = True) -> None:
        """Train the policy adapter and nothing else; or nothing at all."""
        self.requires_grad_(False)
        for _, parameter in self.policy_parameters():
            parameter.requires_grad_(trainable)

    def name_base(self, name: str, revision: str | None) -> None:
        """Write the loaded base model and its revision into the ``adapter_config.json`` that is saved."""
        config = self.peft_config[POLICY]
        config.base_model_name_or_path, config.revision = name or config.base_model_name_or_path, revision

    def add_adapter(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter as PEFT does, and hold all of it in fp32."""
        with whole_shapes():
            super().add_adapter(adapter_name, *args, **kwargs)
        hold_in_fp32(self, adapter_name)

    def save_pretrained(
        self, save_directory: str, *args: Any, selected_adapters: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        """Save the policy adapter alone, as PEFT does, unless others are asked for."""
        chosen = list(selected_adapters) if selected_adapters is not None else [POLICY]
        super().save_pretrained(save_directory, *args, selected_adapters=chosen, **kwargs)


def attach(
    base: nn.Module, policy: AdapterFolder | LoraConfig, reference: AdapterFolder | None
) -> PolicyReferenceModel:
    """Attach the policy and, if given, the frozen reference to one base model.

    The policy is fp32 whatever the base's dtype, so that the optimizer's small steps are not rounded away; the
    reference goes through the same casts, so that equal files give equal log-probs.

    Args:
        base: The base model, quantised or not; it is frozen.
        policy: The adapter folder the policy starts from, or the config of a fresh LoRA.
        reference: The adapter folder of the reference.

    Raises:
        AdapterError: If an adapter does not fit the base, or was not attached as it is on disk.
        ConfigError: If a fresh LoRA would change the base.
    """
    folders: dict[str, AdapterFolder] = {}
    if isinstance(policy, AdapterFolder):
        model = _wrap(base, LoraConfig.from_pretrained(str(policy.path)), policy)
        model.starts_as_base = False
        folders[POLICY] = policy
    else:
        check_fresh_init(policy.init_lora_weights)
        check_present(policy.target_parameters, base)
        model = _wrap(base, policy, None)
        model.starts_as_base = policy.init_lora_weights in (True, "gaussian", "eva")
    if reference is not None:
        folders[REFERENCE] = reference
    for name, folder in folders.items():
        check_expert_count(folder.config, folder.key, folder.path, model.config)
        _load(model, folder, name)
    for name, folder in folders.items():
        _check_attached(model, folder, name)
    model.bind_switch()
    model.train_only_policy()
    model.digests = {name: adapter_digest(model, name) for name in model.peft_config}
    model.reference_digest = model.digests.get(REFERENCE)
    return model


def _wrap(base: nn.Module, config: LoraConfig, folder: AdapterFolder | None) -> PolicyReferenceModel:
    config.inference_mode = False
    try:
        with whole_shapes():
            model = PolicyReferenceModel(base, as_attached(config, base), adapter_name=POLICY)
    except _PEFT_ERRORS as error:
        raise _misfit(folder, str(error)) from error
    hold_in_fp32(model, POLICY)
    return model


def _load(model: PolicyReferenceModel, folder: AdapterFolder, name: str) -> None:
    """Load an adapter's file and check that every tensor in it has a place, and every place a tensor."""
    try:
        if name not in model.peft_config:
            config = LoraConfig.from_pretrained(str(folder.path))
            config.inference_mode = True
            model.add_adapter(name, as_attached(config, model.get_base_model()))
        result = model.load_adapter(str(folder.path), name, is_trainable=name == POLICY, torch_device="cpu")
    except _PEFT_ERRORS as error:
        raise _misfit(folder, str(error)) from error
    unexpected = without_copies(dict.fromkeys(result.unexpected_keys))
    for keys, what in ((list(unexpected), "has no place for"), (result.missing_keys, "finds no weights for")):
        if keys:
            raise _misfit(folder, f"the base model {what} {len(keys)} of its tensors, the first is {keys[0]}")


def _check_attached(model: PolicyReferenceModel, folder: AdapterFolder, name: str) -> None:
    """Compare each tensor of an adapter's file with the attached one, once all adapters are loaded."""
    attached = get_peft_model_state_dict(model, adapter_name=name)
    on_disk = without_copies(load_peft_weights(str(folder.path), device="cpu"))
    config = model.peft_config[name]
    for key, expected in convert_peft_adapter_state_dict_for_transformers(model, config, on_disk, name).items():
        named = f"`{folder.key}: {folder.path}`: tensor {key}"
        if not expected.isfinite().all():
            raise AdapterError(f"{named} has values that are not finite. Train it again.")
        found = attached.get(key)
        if found is None or not torch.equal(found.detach().cpu(), expected.to(found.dtype)):
            raise AdapterError(f"{named} was not attached as it is on disk. It may be damaged; save the adapter again.")


def without_copies(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """The tensors of an adapter's file that are the adapter.

    Where the vocabulary was resized, PEFT 0.20 and 0.21 save an embedding of ``modules_to_save`` three times
    (utils/save_and_load.py:342): as ``….weight``, which it reads again; a second time under a key that it has no place
    for; and the base's, which is computed with only while no adapter is active.
    """
    copies = (".modules_to_save.", ".original_module.")
    return {key: tensor for key, tensor in tensors.items() if not any(copy in key for copy in copies)}


def _misfit(folder: AdapterFolder | None, reason: str) -> AdapterError:
    if folder is None:
        line = "peft_use_dora: false" if "use_dora" in reason else "lora_target_linear: true"
        return AdapterError(f"the LoRA settings do not fit the base model: {reason} Write: {line}")
    trained_on = folder.config.get("base_model_name_or_path")
    resized = "size mismatch" in reason and "embed_tokens" in reason
    tokens = f"For its new tokens, write: tokenizer_config: {folder.path}. " if resized else ""
    return AdapterError(
        f"`{folder.key}: {folder.path}` does not fit the base model: {' '.join(reason.split())[:200]}. "
        f"{tokens}It was trained on {trained_on}. Write: base_model: {trained_on}"
    )


def adapter_tensors(model: PolicyReferenceModel, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter under the keys of its file."""
    return dict(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))


def adapter_digest(model: PolicyReferenceModel, name: str, whole: Callable[[Tensor], Tensor] = Tensor.detach) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of an adapter's tensors, and the settings that scale them.

    Where a rank holds but a part of a tensor, ``whole`` gathers it.
    """
    digest = hashlib.sha256(json.dumps(adapter_settings(model.peft_config[name].to_dict()), sort_keys=True).encode())
    for key, tensor in sorted(adapter_tensors(model, name).items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(whole(tensor).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hold_in_fp32(model: nn.Module, adapter: str) -> None:
    """Hold an adapter's ``modules_to_save`` in fp32, while they compute in the base's dtype.

    PEFT 0.20 and 0.21 cast the LoRA of a 16-bit base to fp32 (``autocast_adapter_dtype``) but copy these in 16 bits:
    values lose digits as they are loaded, small steps are rounded away, and ZeRO-3 of DeepSpeed 0.19 stops because what
    trains has two dtypes (runtime/zero/utils.py:218). Call this before the adapter's values are loaded.
    """
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or adapter not in wrapper.modules_to_save:
            continue
        dtype = next(wrapper.original_module.parameters()).dtype
        if dtype in (torch.bfloat16, torch.float16):
            module = wrapper.modules_to_save[adapter].float()
            module.forward = partial(_compute_in, dtype, module.forward)


def _compute_in(dtype: torch.dtype, forward: Any, values: Tensor, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(values.device.type, dtype):
        return forward(values, *args, **kwargs).to(dtype)
