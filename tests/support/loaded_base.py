"""An axolotl plugin, for tests alone, that records a base model as it is when it has been loaded."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin

from tests.support.cpu_ranks import records


class LoadedBase(BasePlugin):
    """Writes ``loaded-<rank>.json``: digests of every tensor, quantisation states included, and how they came."""

    def post_model_build(self, cfg: Any, model: Any) -> None:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        states = {name: getattr(value, "quant_state", None) for name, value in tensors.items()}
        for name, state in states.items():
            if state is not None:
                tensors |= {f"{name}.{key}": one for key, one in state.as_dict(packed=True).items()}
        facts = {
            "digests": {name: digest(value) for name, value in tensors.items()},
            "four_bit": [name for name, state in states.items() if state is not None],
            "mapped": getattr(model, "is_mapped", False),
            "name": model.config.name_or_path,
        }
        (records(cfg.output_dir) / f"loaded-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(facts))


def digest(value: torch.Tensor) -> str:
    data = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    kind = f"{value.dtype} {tuple(value.shape)} {getattr(getattr(value, 'quant_state', None), 'dtype', '')}"
    return hashlib.sha256(kind.encode() + data.numpy().tobytes()).hexdigest()
