"""Adapters that DeepSpeed or FSDP2 shards: gather, digest and load them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.tensor import DTensor, distribute_tensor

from dpo_plugin.engines.master_weights import master_weight
from dpo_plugin.errors import CheckpointError
from dpo_plugin.model.adapters import POLICY, REFERENCE, PolicyReferenceModel, adapter_digest, without_copies

ADAPTER_FILE = "adapter_model.safetensors"


def deepspeed_utils() -> Any:
    """``deepspeed.utils``; only asked for where a parameter shows that DeepSpeed is there."""
    return import_module("deepspeed.utils")


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that FSDP2 may have sharded, on every rank; all ranks must call."""
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
    """Digest the reference adapter, SHA-256, as the engine holds it; all ranks must call."""
    with gathered(parameter for _, parameter in model.adapter_parameters()):
        return adapter_digest(model, REFERENCE, full_tensor)


def gather_policy(model: PolicyReferenceModel) -> dict[str, Tensor]:
    """Gather the fp32 policy adapter by parameter name on the CPU of every rank; all ranks must call.

    torch's checkpoint wrapper, which ``fsdp_config.activation_checkpointing`` brings, does not belong in the names.
    """
    named = model.policy_parameters()
    return {name.replace(_CHECKPOINT_PREFIX, ""): _master(parameter).cpu() for name, parameter in named}


def _master(parameter: nn.Parameter) -> Tensor:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        master: Tensor = deepspeed_utils().safe_get_full_fp32_param(parameter)
        return master
    return full_tensor(master_weight(parameter))


def load_policy(model: PolicyReferenceModel, folder: Path) -> None:
    """Load a saved policy adapter into a model that FSDP2 has sharded; every rank reads it and keeps its own part.

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
