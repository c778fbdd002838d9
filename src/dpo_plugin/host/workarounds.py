"""Every patch of axolotl, transformers, trl and bitsandbytes: fault, first and last version, the test that needs it.

Lines are those of the newest host that has the fault: of axolotl 0.21 with TRL 1.14, transformers 5.20 and accelerate
1.15, unless another is named. Faults of DeepSpeed and accelerate that take no patch are worked around in
`dpo_plugin.engines.precision`; the commands that axolotl runs on the trained adapter in `dpo_plugin.host.plugin` and
`dpo_plugin.host.commands.running`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import transformers.trainer
from axolotl.loaders.model import ModelLoader
from axolotl.utils.schemas.validation import OptimizationValidationMixin
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from dpo_plugin.host.output_dir.resume import saving
from dpo_plugin.model.adapters import PolicyReferenceModel


@cache
def accept_fsdp2_with_nf4(trainer: str) -> None:
    """Allow QLoRA under FSDP2 to runs of our trainer, which axolotl 0.19 to 0.21 refuse for DPO although it runs.

    The schema for a config is made from its bases when plugins have been registered, so the check is replaced in the
    base that has it (utils/schemas/validation.py:1500; 0.19 looks at ``fsdp_version`` too, :1178).
    tests/ranks/test_ranks.py trains the combination; tests/unit/host/test_workarounds.py fails when the host allows it.

    Args:
        trainer: ``trainer_cls`` of our runs; any other config is checked as before.
    """
    theirs = vars(OptimizationValidationMixin)["check_fsdp2_base_model_quant_rl"].__func__

    def check_fsdp2_base_model_quant_rl(cls: Any, data: Any) -> Any:
        ours = data.get("trainer_cls") == trainer and data.get("load_in_4bit") and data.get("adapter") == "qlora"
        return data if ours else theirs(cls, data)

    OptimizationValidationMixin.check_fsdp2_base_model_quant_rl = classmethod(check_fsdp2_base_model_quant_rl)


@cache
def share_parameter_wrappers() -> None:
    """Let a second adapter on the same parameters share the wrappers of the first.

    With ``lora_target_parameters``, axolotl 0.19 to 0.21 replaces PEFT's ``_inject_parameters`` by a copy that is older
    than peft 3350 (monkeypatch/moe_quant.py), and the reference comes to lie inside the policy's wrappers, where its
    tensors have other keys than in its file. Experts in 4 bits it does not find within wrappers, and the reference gets
    none of them. tests/integration/test_expert_adapters.py fails without either.
    """
    theirs = LoraModel._create_and_replace

    def _create_and_replace(
        self: Any, config: Any, adapter: str, target: Any, *rest: Any, current_key: str, parameter_name: Any = None
    ) -> None:
        if parameter_name is not None:
            owner = current_key.rpartition(".")[0].replace(".base_layer", "")
            wrapper = self.model.get_submodule(owner)
            while isinstance(wrapper, ParamWrapper) and wrapper.parameter_name != parameter_name:
                wrapper = wrapper.base_layer
            target = wrapper if isinstance(wrapper, ParamWrapper) else target
            current_key = f"{owner}.{parameter_name}"
        theirs(self, config, adapter, target, *rest, current_key=current_key, parameter_name=parameter_name)

    def _inject_parameters(self: Any, peft_config: Any, model: nn.Module, **kwargs: Any) -> Any:
        asked = peft_config.target_parameters
        wrapped = [
            f"{path}.{name}"
            for path, module in model.named_modules()
            for name in getattr(module, "parametrizations", ())
            if f".{path}.{name}".replace(".base_layer", "").endswith(tuple(f".{one}" for one in asked))
        ]
        peft_config.target_parameters = [*asked, *wrapped]
        try:
            return super(LoraModel, self)._inject_parameters(peft_config=peft_config, model=model, **kwargs)
        finally:
            peft_config.target_parameters = asked

    LoraModel._create_and_replace = _create_and_replace
    LoraModel._inject_parameters = _inject_parameters


@cache
def load_base_through(load: Callable[[Any, Callable[[], Any]], Any]) -> None:
    """Let the host's loader get the base model from ``load``, which is given the loader and the host's own way.

    axolotl 0.19 to 0.21 puts a 4-bit base whole onto each GPU that ZeRO-3 or FSDP2 is to shard it over
    (loaders/model.py, _set_device_map_config). tests/ranks/test_loading.py compares the memory of both ways.
    """
    theirs = ModelLoader._load_model_from_pretrained

    def _load_model_from_pretrained(self: Any, *args: Any) -> Any:
        return load(self, partial(theirs, self, *args))

    ModelLoader._load_model_from_pretrained = _load_model_from_pretrained


def ignore_deprecated_collectives() -> None:
    """Silence torch 2.13's FutureWarnings about `all_gather_into_tensor` and `reduce_scatter_tensor`.

    DeepSpeed 0.19 and FSDP2 call them in every gather on axolotl 0.19 to 0.21, and a user can do nothing about it.
    tests/ranks/test_ranks.py counts them in the output of two ranks.
    """
    deprecated = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", deprecated, FutureWarning)


def keep_nf4_as_packed(model: nn.Module) -> None:
    """Keep 4-bit weights in the form that training needs through evaluations and samples.

    On CPUs with AVX512-BF16, bitsandbytes 0.50.2, which axolotl 0.19 to 0.21 have, packs them anew for inference
    (nn/modules.py:613), and the next training step fails: "a view of a leaf Variable that requires grad is being used
    in an in-place operation".
    tests/integration/test_compute_runs.py evaluates a 4-bit run between its steps, test_samples_runs.py samples one.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


class HeldByPolicy:
    """Stands in for a reference model when the reference lives in the policy's own adapters."""


def hide_adapters_from_trl(model: nn.Module, ref_model: nn.Module | None) -> tuple[nn.Module, Any]:
    """Give model and ref_model a form that keeps TRL 1.9 to 1.14 from copying and casting our adapters.

    Given a PeftModel and no ref_model, TRL adds an adapter "ref", always a copy of "default"
    (trl/trainer/dpo_trainer.py:670); a stand-in, which the trainer's setter of `ref_model` takes off again, prevents
    it. It casts what is trainable on a quantised base to bf16 (:708), so nothing is trainable until it is done.
    Both are held by tests/integration/test_runs.py.
    """
    if not isinstance(model, PolicyReferenceModel):
        return model, ref_model
    model.train_only_policy(False)
    return model, HeldByPolicy()


def save_policy_instead_of_base(base: nn.Module, policy: PolicyReferenceModel) -> None:
    """Make the host's ``base.save_pretrained(output_dir)`` write the policy adapter.

    After saving the trainer's model, axolotl 0.19 to 0.21 saves the base that it loaded once more, adapters injected,
    as model.safetensors: 40 GB at 72B and of no use (train.py:428-430); on SIGINT it saves only that (:181).
    tests/integration/test_runs.py fails when the host stops doing so and this can go.
    """

    def save_pretrained(save_directory: str, *_: Any, **__: Any) -> None:
        with saving(Path(save_directory)):
            policy.save_pretrained(save_directory)

    base.save_pretrained = save_pretrained  # type: ignore[assignment]


def save_fsdp2_adapter_through(trainer: Any) -> None:
    """Make the host's last save under FSDP2 write what a checkpoint's save writes.

    axolotl hands the base without PEFT's wrapper to a function that gathers the adapter (train.py:337). In 0.19 and
    0.20 its keys lack ``base_model.model.``; PEFT and vLLM match none of them (vllm #34186: the base is served
    silently). 0.21 mends the keys and still leaves out ``modules_to_save`` (integrations/expert_parallel/shard.py:736).
    tests/ranks/test_ranks.py matches the keys of what FSDP2 saves, test_new_tokens.py those of ``modules_to_save``.
    """
    from axolotl.integrations.expert_parallel import shard

    def save_fsdp2_lora_adapter(model: nn.Module, output_dir: str) -> bool:
        trainer.save_model(output_dir)
        return True

    shard.save_fsdp2_lora_adapter = save_fsdp2_lora_adapter


@contextmanager
def without_fsdp_model_file() -> Iterator[None]:
    """Context in which transformers' trainer saves no model with FSDP's optimizer.

    The adapter is in the checkpoint already. In FULL_STATE_DICT, accelerate writes pytorch_model_fsdp.bin as well: 1.13
    (axolotl 0.19) with rank 0's part of each tensor (utils/fsdp_utils.py:59), 1.15 with a second copy of the adapter,
    gathered over all ranks (:63). tests/ranks/test_ranks.py looks for the file.
    """
    theirs = transformers.trainer.save_fsdp_model
    transformers.trainer.save_fsdp_model = lambda *_, **__: None
    try:
        yield
    finally:
        transformers.trainer.save_fsdp_model = theirs


@contextmanager
def without_what_trl_does_itself(model: nn.Module, args: Any) -> Iterator[None]:
    """Context in which TRL's trainer is made without refusing a LoRA on the head and without reference log-probs.

    TRL 1.16 refuses the LoRA because its own fused head reads the base's weight (trl/trainer/dpo_trainer.py:835); ours
    calls the head. With ``precompute_ref_log_probs``, TRL runs its own reference, under a hash of every weight of the
    base on every rank (:981; 1.9:1113); ours is cached, under a key that is read from the files.
    tests/integration/test_kinds_of_lora.py and test_references.py hold both.
    """
    asked, args.precompute_ref_log_probs = args.precompute_ref_log_probs, False
    hides_head = isinstance(model, PolicyReferenceModel)
    if hides_head:
        model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        args.precompute_ref_log_probs = asked
        if hides_head:
            del model.get_output_embeddings
