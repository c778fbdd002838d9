"""Find the weights that a NaN or infinite log-probability comes from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpo_plugin.model.adapters import PolicyReferenceModel

CURES = {
    "base model": "base_model: <a model whose weights are finite>",
    "policy adapter": "learning_rate: <a smaller one>, from the checkpoint before",
    "reference adapter": "lora_model_dir: <an adapter whose weights are finite>",
    "trained model": "learning_rate: <a smaller one>, and look at base_model's own weights",
    "reference model": "base_model: <a model whose weights are finite>",
}
"""Owner of weights → the line to write if they are not finite."""


def weights_not_finite(model: nn.Module, ref_model: nn.Module | None = None) -> str | None:
    """Say which weights of the models are NaN or infinite, and what to write; None if none are.

    Under ZeRO-3 and FSDP2 a rank looks at the part that it holds; it does not wait for others, which may not ask.
    """
    for owner, name, values in _weights(model, ref_model):
        if values.is_floating_point() and (count := int((~values.isfinite()).sum())):
            return (
                f"{count} of {values.numel()} values of the {owner}'s {name} are not finite, so it is the {owner} and "
                f"not the row. Write: {CURES[owner]}"
            )
    return None


def _weights(model: nn.Module, ref_model: nn.Module | None) -> Iterator[tuple[str, str, Tensor]]:
    owners: dict[str, str] = {}
    if isinstance(model, PolicyReferenceModel):
        owners |= {name: "reference adapter" for name, _ in model.adapter_parameters()}
        owners |= {name: "policy adapter" for name, _ in model.policy_parameters()}
    own = "base model" if owners else "trained model"
    named = [(owners.get(name, own), name, parameter) for name, parameter in model.named_parameters()]
    if ref_model is not None:
        named += [("reference model", name, parameter) for name, parameter in ref_model.named_parameters()]
    return ((owner, name, part) for owner, name, parameter in named for part in _held(parameter))


@torch.no_grad()
def _held(parameter: Any) -> Iterator[Tensor]:
    """Yield this rank's part of a parameter; of a 4-bit one its scales, since the codes are always finite."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        scales = (state.absmax, state.offset, getattr(state.state2, "absmax", None))
        yield from (scale for scale in scales if isinstance(scale, Tensor))
    elif hasattr(parameter, "ds_tensor"):
        yield parameter.ds_tensor
    else:
        yield parameter.to_local() if hasattr(parameter, "to_local") else parameter
