"""fp32 where it counts: log-probs under FSDP2, and the adapter that the optimizer updates, whatever the engine casts.

Each function names the fault that it works around; tests/ranks/test_ranks.py holds them on two ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dpo_plugin.engines.sharded import deepspeed_utils
from dpo_plugin.model.adapters import PolicyReferenceModel


def keep_logps_fp32(accelerator: Any) -> None:
    """Let FSDP2 return log-probs as they are, and sum gradients over ranks in fp32.

    accelerate 1.13 to 1.15 sets both ``output_dtype`` and ``reduce_dtype`` to bf16 (utils/dataclasses.py:2137), so that
    what the root's forward returns is rounded: ln 2 becomes 0.6914, and a log-prob of 300 nats moves in steps of 2.
    """
    if accelerator.is_fsdp2 and (policy := accelerator.state.fsdp_plugin.mixed_precision_policy) is not None:
        policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def adapter_values(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Get the tensors of both adapters as they are now, without copying them."""
    if not isinstance(model, PolicyReferenceModel):
        return {}
    return {parameter: parameter.data for _, parameter in model.adapter_parameters()}


def restore_adapter_dtype(values: Mapping[nn.Parameter, Tensor]) -> None:
    """Undo a cast of the adapters.

    With FSDP, axolotl 0.19 to 0.21 casts the whole model to ``cfg.torch_dtype`` when our trainer is built
    (core/builders/rl.py:450), and the policy would lose the fp32 weights that its optimizer updates. Only the base's
    parameters must agree in dtype: FSDP2 shards the policy in units of its own, and frozen ones may differ.
    """
    for parameter, value in values.items():
        parameter.data = value


def init_master_weights(values: Mapping[nn.Parameter, Tensor]) -> None:
    """Start the fp32 weights that DeepSpeed updates from the adapter as it was attached; frozen ones have none.

    DeepSpeed copies them from weights that were cast to bf16 (0.19, runtime/zero/stage3.py:1170). A weight that starts
    on bf16's grid looks the same to the model until it has moved half a spacing: at 0.05 and a learning rate of 1e-6,
    for 120 steps. Off the grid, some weights move visibly in every step, and the curve is that of other engines.
    """
    parameter: Any
    for parameter, value in values.items():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            size = parameter.ds_tensor.numel()
            first = size * torch.distributed.get_rank(parameter.ds_process_group)
            part = value.flatten()[first : first + size]
            deepspeed_utils().safe_set_local_fp32_param(parameter, pad(part, (0, size - part.numel())))
        elif hasattr(parameter, "_hp_mapping"):
            deepspeed_utils().safe_set_full_fp32_param(parameter, value)
