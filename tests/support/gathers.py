"""An axolotl plugin, for tests alone: counts what ranks gather in each micro-step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.integrations.base import BasePlugin, PluginManager
from peft import PeftModel
from pydantic import BaseModel
from transformers import TrainerCallback

from dpo_plugin.host.workarounds import accept_fsdp2_with_nf4
from tests.support.cpu_ranks import records

LEAST = 512
"""Bytes from which on a gathered tensor is a parameter; figures for the log are smaller, the least LoRA shard is not."""


class StockOnAdapters(AxolotlDPOTrainer):
    """Stock's trainer on what it would have to be given: the SFT adapter, of which TRL makes its own frozen ``ref``."""

    def __init__(self, model: Any, ref_model: Any = None, *, peft_config: Any = None, **kwargs: Any):
        adapter = PluginManager.get_instance().cfg.lora_model_dir
        super().__init__(PeftModel.from_pretrained(model, adapter, is_trainable=True), None, **kwargs)


STOCK = f"{__name__}.{StockOnAdapters.__name__}"


class NoKeys(BaseModel):
    """No keys of the YAML."""


class CountGathers(BasePlugin):
    """Writes ``[gathers, bytes]`` of parameters for each micro-step."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.micro_steps: list[tuple[int, int]] = []

    def register(self, cfg: Any) -> None:
        accept_fsdp2_with_nf4(STOCK)
        for name in ("all_gather_into_tensor", "all_gather_single", "all_gather"):
            setattr(dist, name, self._counted(getattr(dist, name)))

    def get_input_args(self) -> str:
        """Have the host make its schema anew, after `register`; without keys of a plugin, 0.19 has made it by then."""
        return f"{__name__}.{NoKeys.__name__}"

    def _counted(self, gather: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            output = args[0] if args else kwargs.get("output_tensor", kwargs.get("tensor_list"))
            tensors = output if isinstance(output, list) else [output]
            self.sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
            return gather(*args, **kwargs)

        return counted

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        training_step = trainer.training_step

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.sizes.clear()
            loss = training_step(*args, **kwargs)
            parameters = [size for size in self.sizes if size >= LEAST]
            self.micro_steps.append((len(parameters), sum(parameters)))
            return loss

        trainer.training_step = counted

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [_Write(self)]


class _Write(TrainerCallback):
    def __init__(self, counts: CountGathers):
        self.counts = counts

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            gathers_file(args.output_dir).write_text(json.dumps(self.counts.micro_steps))


def gathers_file(output_dir: str | Path) -> Path:
    return records(output_dir) / "gathers.json"
