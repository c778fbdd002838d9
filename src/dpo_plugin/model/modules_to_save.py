"""Modules that an adapter trains whole: fp32, as its LoRA is, on a base of any dtype."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn


def hold_in_fp32(model: nn.Module, adapter: str) -> None:
    """Hold an adapter's ``modules_to_save`` in fp32, while they compute in the base's dtype.

    PEFT 0.20 casts the LoRA of a 16-bit base to fp32 (``autocast_adapter_dtype``) but copies these modules in 16 bits:
    values lose digits as they are loaded, small steps are rounded away, and ZeRO-3 of DeepSpeed 0.19 stops because what
    trains has two dtypes (runtime/zero/utils.py:218). Call this before the adapter's values are loaded.

    Args:
        model: The PEFT model.
        adapter: The adapter's name.
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
