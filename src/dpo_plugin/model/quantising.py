"""How transformers loads a model in 4 bits: weight by weight into files, or mapped from them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from dpo_plugin.errors import ConfigError

_AT_ONCE = 1 << 26
"""Bytes that are gathered before they are written as a file; a weight that is larger has a file of its own."""


class Writer:
    """Writes tensors into files as they come, under a context for errors of the disk, and forgets them."""

    def __init__(self, folder: Path, guard: Callable[[], AbstractContextManager[None]]):
        self.folder, self.index, self.guard = folder, dict[str, str](), guard
        self.failure: Exception | None = None
        self._pending, self._bytes, self._number = dict[str, Tensor](), 0, 0

    def add(self, name: str, value: Tensor) -> nn.Parameter:
        """Take a tensor with its quantisation state, if it has one; return one of its shape without memory."""
        if self.failure:
            raise self.failure
        state = getattr(value, "quant_state", None)
        tensors = {f"{name}.{key}": one for key, one in state.as_dict(packed=True).items()} if state else {}
        for key, one in {name: value.data, **tensors}.items():
            self._pending[key] = one.detach().cpu().contiguous()
            self._bytes += one.nbytes
        if self._bytes >= _AT_ONCE:
            self.flush()
        return_freed_memory()
        stub = nn.Parameter(torch.zeros(1, dtype=value.dtype).expand(value.shape), requires_grad=False)
        stub.is_written = True  # type: ignore[attr-defined]
        return stub

    def flush(self) -> None:
        """Write what has been taken."""
        if self._pending:
            self._number += 1
            name = f"model-{self._number:05d}.safetensors"
            try:
                with self.guard():
                    save_file(self._pending, self.folder / name, metadata={"format": "pt"})
            except ConfigError as error:
                self.failure = error
                raise
            self.index |= dict.fromkeys(self._pending, name)
            self._pending, self._bytes = {}, 0


def return_freed_memory() -> None:
    """Give the system what glibc keeps of freed weights, else as much again as was freed of them (Linux alone)."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def staying_on_host() -> AbstractContextManager[None]:
    """Context in which transformers leaves a checkpoint in 4 bits where it is mapped.

    Given no ``device_map``, and with ZeRO-3 it takes none, it would put it onto the GPU.
    """

    class Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
        def update_device_map(self, _: Any) -> dict[str, str]:
            return {"": "cpu"}

    return _quantizing_by(Quantizer)


def quantising_into(writer: Writer) -> AbstractContextManager[None]:
    """Context in which transformers hands each weight that it has loaded and quantised on to a writer.

    It loads one weight at a time while it quantises (core_model_loading.py, ``has_on_the_fly_quantization``), but would
    keep them all.
    """

    class Quantize(Bnb4bitQuantize):  # type: ignore[misc]
        def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            found = dict(input_dict)
            for name in input_dict:
                if Bnb4BitHfQuantizer.param_needs_quantization(self.hf_quantizer, kwargs["model"], name):
                    found |= super().convert({name: input_dict[name]}, **kwargs)
            values = {name: value[0] if isinstance(value, list) else value for name, value in found.items()}
            return {name: writer.add(name, value) for name, value in values.items()}

    class Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
        def param_needs_quantization(self, *_: Any, **__: Any) -> bool:
            return True

        def param_element_size(self, *_: Any, **__: Any) -> float:
            return 0.0  # else as much is reserved on the GPU as the model takes (caching_allocator_warmup)

        def get_quantize_ops(self) -> Quantize:
            return Quantize(self)

    return _quantizing_by(Quantizer)


@contextmanager
def _quantizing_by(quantizer: type[Bnb4BitHfQuantizer]) -> Iterator[None]:
    theirs = AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = quantizer
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = theirs
