"""fp32 master weights in a run of full fine-tuning: made with the optimizer, saved and resumed with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from torch import Tensor, nn

from dpo_plugin.engines import master_weights as engine
from dpo_plugin.host.log import LOG


class MasterWeightsTrainer(AxolotlDPOTrainer):  # type: ignore[misc]
    """axolotl's DPO trainer whose optimizer updates fp32 masters of bf16 weights on every engine."""

    masters: bool | None = None
    _widened: frozenset[str] = frozenset()

    def prepare_master_weights(self) -> None:
        """Decide whether this run makes master weights, as in `engine.prepare_models`."""
        wanted = self.settings.config.compute.master_weights
        self.masters = engine.prepare_models(wanted, self.accelerator, self.model, self.ref_model)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Create the host's optimizer, and let it update master weights.

        The host calls it before FSDP2 shards the model, and after it has cast all of that (core/builders/rl.py:330).
        """
        if self.masters and self.accelerator.is_fsdp2:
            self._widened |= engine.widen(self.model)
        optimizer = super().create_optimizer(model)
        if self.masters and not engine.add_master_weights(optimizer, self.model):
            LOG.warning(
                f"dpo_plugin: {type(optimizer).__name__} updates the bf16 weights themselves, where small updates are "
                "rounded away: it does not take fp32 master weights. Write: optimizer: adamw_torch_fused"
            )
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save weights in the dtype that they are computed in, not in that of FSDP2's masters."""
        if not self._widened or state_dict is None:
            super()._save(output_dir, state_dict)
            return
        super()._save(output_dir, engine.narrow(state_dict, self._widened))
        self.model.config.dtype = torch.bfloat16
        self.model.config.save_pretrained(output_dir or self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save them with the optimizer's master weights."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            engine.save_master_weights(self.model, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load them with the optimizer's master weights."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            engine.load_master_weights(self.model, Path(checkpoint))
