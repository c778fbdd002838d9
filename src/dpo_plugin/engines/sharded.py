"""What FSDP2 and DeepSpeed need beside the host: fp32 where it counts, and adapters that are made whole again.

Each function names the fault that it works around; tests/ranks/test_ranks.py holds them all on two ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import pad

from dpo_plugin.errors import CheckpointError
from dpo_plugin.model.adapters import POLICY, REFERENCE, PolicyReferenceModel, adapter_digest, without_copies
from dpo_plugin.model.buffers import ComputedBuffers

ADAPTER_FILE = "adapter_model.safetensors"


# ── before the model is sharded ──


def keep_logps_fp32(accelerator: Any) -> None:
    """Let FSDP2 return log-probs as they are, and sum gradients over ranks in fp32.

    accelerate 1.13 sets both ``output_dtype`` and ``reduce_dtype`` to bf16 (utils/dataclasses.py:2105), so that what
    the root's forward returns is rounded: ln 2 becomes 0.6914, and a log-prob of 300 nats moves in steps of 2.
    """
    if accelerator.is_fsdp2 and (policy := accelerator.state.fsdp_plugin.mixed_precision_policy) is not None:
        policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def adapter_values(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """The tensors of both adapters as they are now; they are not copied."""
    if not isinstance(model, PolicyReferenceModel):
        return {}
    return {parameter: parameter.data for _, parameter in model.adapter_parameters()}


def restore_adapter_dtype(values: dict[nn.Parameter, Tensor]) -> None:
    """Undo a cast of the adapters.

    With FSDP, axolotl 0.19 casts the whole model to ``cfg.torch_dtype`` when our trainer is built
    (core/builders/rl.py:330), and the policy would lose the fp32 weights that its optimizer updates. Only the base's
    parameters must agree in dtype: FSDP2 shards the policy in units of its own, and frozen ones may differ.
    """
    for parameter, value in values.items():
        parameter.data = value


def init_master_weights(values: Mapping[nn.Parameter, Tensor]) -> None:
    """Let the fp32 weights that DeepSpeed updates start from the adapter as it was attached.

    DeepSpeed 0.18 copies them from weights that it has cast to bf16 (runtime/zero/stage3.py:1034). A weight that starts
    on bf16's grid looks the same to the model until it has adapter_norms half a spacing: at 0.05 and a learning rate of
    1e-6, for 120 steps. Off the grid, some weights move visibly in every step, and the curve is that of other engines.
    """
    parameter: Any
    for parameter, value in values.items():
        if hasattr(parameter, "ds_id"):
            size = parameter.ds_tensor.numel()
            first = size * torch.distributed.get_rank(parameter.ds_process_group)
            part = value.flatten()[first : first + size]
            deepspeed_utils().safe_set_local_fp32_param(parameter, pad(part, (0, size - part.numel())))
        elif hasattr(parameter, "_hp_mapping"):
            deepspeed_utils().safe_set_full_fp32_param(parameter, value)


def deepspeed_utils() -> Any:
    """``deepspeed.utils``; only asked for where a parameter shows that DeepSpeed is there."""
    return import_module("deepspeed.utils")


# ── adapters made whole ──


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 may have sharded, gathered on every rank; all ranks must call."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which parameters that ZeRO-3 may have partitioned are whole; all ranks must enter."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def reference_digest(model: PolicyReferenceModel) -> str:
    """SHA-256 of the reference adapter as the engine holds it; all ranks must call."""
    with gathered(parameter for _, parameter in model.adapter_parameters()):
        return adapter_digest(model, REFERENCE, whole)


def whole_policy(model: PolicyReferenceModel) -> dict[str, Tensor]:
    """The fp32 policy adapter by parameter name, gathered on every rank, on the CPU; all ranks must call.

    torch's checkpoint wrapper, which ``fsdp_config.activation_checkpointing`` brings, does not belong in the names.
    """
    named = model.policy_parameters()
    return {name.replace(_CHECKPOINT_PREFIX, ""): _master(parameter).cpu() for name, parameter in named}


def _master(parameter: nn.Parameter) -> Tensor:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        master: Tensor = deepspeed_utils().safe_get_full_fp32_param(parameter)
        return master
    return whole(parameter)


def load_policy(model: PolicyReferenceModel, folder: Path) -> None:
    """Load a saved policy adapter into a sharded model; every rank reads the file and keeps its own part.

    Raises:
        CheckpointError: If the file and the policy do not have the same tensors.
    """
    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no {ADAPTER_FILE}. Write: resume_from_checkpoint: <another checkpoint>")
    like = next(parameter for _, parameter in model.policy_parameters())
    assert isinstance(like, DTensor)
    values = without_copies(load_file(file))
    parts = {
        key: distribute_tensor(v, like.device_mesh, like.placements, src_data_rank=None) for key, v in values.items()
    }
    result = set_peft_model_state_dict(model, parts, adapter_name=POLICY)
    ours = [key for key in result.missing_keys if f".{POLICY}." in key]
    if ours or result.unexpected_keys:
        raise CheckpointError(
            f"{file} does not fit the policy: {len(ours)} tensors are missing, {len(result.unexpected_keys)} have no "
            f"place, the first is {(ours or result.unexpected_keys)[0]}. Write: resume_from_checkpoint: <another one>"
        )


class OnAnyEngine:
    """Mixin for the trainer; under FSDP2 and DeepSpeed it saves the fp32 policy adapter, whole and nothing else."""

    accelerator: Any
    args: Any
    is_deepspeed_enabled: bool
    model: Any
    state: Any
    _computed_buffers: Sequence[ComputedBuffers]

    def create_accelerator_and_postprocess(self) -> None:
        """Set the precision of FSDP2 before TRL shards the second model (trl/trainer/dpo_trainer.py:934)."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        keep_logps_fp32(self.accelerator)

    def _be_ready_for_engine(self) -> None:
        """To be called once the trainer has its model."""
        if self.is_deepspeed_enabled:
            for kept in self._computed_buffers:
                kept.model.register_forward_pre_hook(kept.restore)
        if self._is_sharded():
            save_through(self)
        self._attached = adapter_values(self.model)

    def restore_adapters(self) -> None:
        """Undo what the host did to the adapters after this trainer was built."""
        restore_adapter_dtype(self._attached)

    def _is_sharded(self) -> bool:
        return bool(self.accelerator.is_fsdp2) and isinstance(self.model, PolicyReferenceModel)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        """Let the engine have the model, and note what the reference is then."""
        prepared: tuple[Any, Any] = super()._prepare_for_training(  # type: ignore[misc]
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if resume_from_checkpoint is None:
            init_master_weights(
                {parameter: value for parameter, value in self._attached.items() if parameter.requires_grad}
            )
        self._attached = {}
        if isinstance(self.model, PolicyReferenceModel) and self.model.has_reference:
            self.model.reference_digest = reference_digest(self.model)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy with PEFT's keys.

        transformers 5.16 gathers the whole base for it under FSDP2 and ZeRO-1 and -2; it saves no adapter where
        ``state_dict_type`` is not FULL_STATE_DICT or DeepSpeed's ``stage3_gather_16bit_weights_on_model_save`` is not
        set; and what it saves from DeepSpeed is rounded to bf16 (trainer.py:3826-3854).
        """
        if not isinstance(self.model, PolicyReferenceModel) or not (self._is_sharded() or self.is_deepspeed_enabled):
            super().save_model(output_dir, _internal_call=_internal_call)  # type: ignore[misc]
            return
        policy = whole_policy(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=policy)  # type: ignore[attr-defined]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save them without the host's copy of the adapter.

        In FULL_STATE_DICT, accelerate 1.13 writes only rank 0's part of each tensor, as pytorch_model_fsdp.bin
        (utils/fsdp_utils.py:138); the adapter is in the checkpoint already.
        """
        with _nothing_for("save_fsdp_model") if self._is_sharded() else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Resume from the adapter file."""
        if self._is_sharded():
            load_policy(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        """Go back to the adapter file of the best checkpoint."""
        if self._is_sharded():
            load_policy(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()  # type: ignore[misc]


@contextmanager
def _nothing_for(name: str) -> Iterator[None]:
    """Let a function that transformers' trainer calls do nothing."""
    theirs = getattr(transformers.trainer, name)
    setattr(transformers.trainer, name, lambda *_, **__: None)
    try:
        yield
    finally:
        setattr(transformers.trainer, name, theirs)


def save_through(trainer: Any) -> None:
    """Let the host's last save under FSDP2 write what a checkpoint's save writes.

    axolotl 0.19 hands the base without PEFT's wrapper to a function that gathers the adapter (train.py:345), whose
    keys then lack ``base_model.model.``; PEFT and vLLM match none of them (vllm #34186: the base is served silently).
    """
    from axolotl.integrations.expert_parallel import shard

    def save_fsdp2_lora_adapter(model: nn.Module, output_dir: str) -> bool:
        trainer.save_model(output_dir)
        return True

    shard.save_fsdp2_lora_adapter = save_fsdp2_lora_adapter
