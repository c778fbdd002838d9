"""What ``quantize_moe_experts`` does on a GPU, done on a CPU.

axolotl 0.19 to 0.21 asks for GPU 0 (loaders/model.py) and quantises what it loads there, while it is loaded
(monkeypatch/moe_quant.py, ``_patched_set_param_for_module``); here the same is done once all is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.loaders.model import ModelLoader
from axolotl.monkeypatch import moe_quant
from bitsandbytes.nn.parametrize import replace_parameter_4bit

Put = Callable[[Any, str, Any], None]


class FourBitExperts(BasePlugin):
    """For ranks, which are processes of their own."""

    def register(self, cfg: Any) -> None:
        quantise_on_cpu()


def quantise_on_cpu(put: Put = setattr) -> None:
    load = ModelLoader._load_model_from_pretrained

    def load_in_four_bits(self: Any, *args: Any) -> Any:
        if "device_map" in self.model_kwargs:
            self.model_kwargs["device_map"] = {"": "cpu"}
        model = load(self, *args)
        quantised = 0
        for path, module in list(model.named_modules()):
            names = [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
            if names:
                moe_quant._moe_load_state["expert_param_order"][path] = list(module._parameters)
            for name in names:
                replace_parameter_4bit(module, name, compress_statistics=True, quant_type="nf4")
            quantised += len(names)
        assert quantised, "the model has no experts"
        return model

    put(ModelLoader, "_load_model_from_pretrained", load_in_four_bits)
