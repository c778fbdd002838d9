"""`PreferenceTrainer`: axolotl's DPO trainer with our adapters, reference, log-probs, losses and metrics."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback

from dpo_plugin.compute.batching import to_pair_batch
from dpo_plugin.compute.dropout import disable_dropout
from dpo_plugin.compute.layouts import Comparison
from dpo_plugin.engines import master_weights
from dpo_plugin.engines.loading import partition_mapped
from dpo_plugin.engines.precision import adapter_values, init_master_weights, keep_logps_fp32, restore_adapter_dtype
from dpo_plugin.engines.ranks import packs_of, without_exchange
from dpo_plugin.engines.sharded import gather_policy, load_policy, reference_digest
from dpo_plugin.errors import ConfigError
from dpo_plugin.host import batches, workarounds
from dpo_plugin.host.callbacks.checkpoint_layers import CheckpointLayers
from dpo_plugin.host.callbacks.health import HealthCallback
from dpo_plugin.host.callbacks.progress import Progress, log_setup
from dpo_plugin.host.callbacks.reference import ReferenceCallback
from dpo_plugin.host.callbacks.samples import SamplesCallback
from dpo_plugin.host.log import LOG
from dpo_plugin.host.output_dir import resume
from dpo_plugin.host.output_dir.card import write_card
from dpo_plugin.host.output_dir.checkpoints import checkpoint_to_resume, write_marker
from dpo_plugin.host.plugin import DPOPlugin
from dpo_plugin.model.adapters import PolicyReferenceModel
from dpo_plugin.model.buffers import ComputedBuffers


class PreferenceTrainer(AxolotlDPOTrainer):  # type: ignore[misc]
    """DPO with policy and reference on one base model; `dpo_plugin.host.callbacks.RunningTrainer` has its attributes.

    Args:
        model: The base model, without adapters.
        ref_model: The second model that the host loads for full fine-tuning; None with an adapter.
        peft_config: The host's LoRA settings, used when no ``lora_model_dir`` is given.
    """

    def __init__(self, model: nn.Module, ref_model: nn.Module | None = None, *, peft_config: Any = None, **kwargs: Any):
        self.settings = DPOPlugin.active().run_settings()
        base, model = model, batches.attach_adapters(self.settings, model, peft_config, kwargs["args"].seed)
        flat = batches.may_share_prefixes(self.settings, base)
        batches.prepare_models(flat, base, ref_model)
        if kwargs["args"].disable_dropout:
            disable_dropout(model, ref_model)
        self.computed_buffers = [ComputedBuffers(one) for one in (model, ref_model) if one is not None]
        kwargs["data_collator"] = batches.make_collator(self.settings, kwargs, flat)
        with workarounds.without_what_trl_does_itself(model, kwargs["args"]):
            super().__init__(*workarounds.hide_adapters_from_trl(model, ref_model), **kwargs)
        if isinstance(model, PolicyReferenceModel):
            model.train_only_policy()
            workarounds.save_policy_instead_of_base(base, model)
        batches.check_lengths(self)
        self._set_up_engine()
        digest = batches.base_identity(base, self.settings)
        self.reference = batches.make_reference(self, base.config, digest)
        name, strategy = self.settings.reference.name, self.reference.strategy
        self.origin = resume.origin_of(model, name, strategy, digest, self.masters)
        self.preference_step = batches.make_step(self)
        self.recorder = batches.make_recorder(self)
        self.compared: Comparison | None = None
        self._eval_prefix, self._fp32_shards = "eval", frozenset[str]()
        self._add_callbacks()
        log_setup(self)

    def _set_up_engine(self) -> None:
        if self.is_deepspeed_enabled:
            for buffers in self.computed_buffers:
                buffers.model.register_forward_pre_hook(buffers.restore)
        if self._is_sharded():
            workarounds.save_fsdp2_adapter_through(self)
        self._attached = adapter_values(self.model)
        wanted = self.settings.config.compute.master_weights
        self.masters = master_weights.prepare_models(wanted, self.accelerator, self.model, self.ref_model)

    def _add_callbacks(self) -> None:
        config = self.settings.config
        for theirs in (ProgressCallback, PrinterCallback):
            self.remove_callback(theirs)
        self.add_callback(ReferenceCallback(self))
        self.add_callback(Progress(bars=not self.args.disable_tqdm))
        if config.samples is not None:
            self.add_callback(SamplesCallback(self, config.samples))
        if config.compute.checkpoint_layers is not None and self.args.gradient_checkpointing:
            self.add_callback(CheckpointLayers(self, config.compute.checkpoint_layers))
        self.add_callback(HealthCallback(self, self.settings.health_checks, config.report))

    @property
    def ref_model(self) -> nn.Module | None:
        """The second model, if there is one."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, value: Any) -> None:
        self._ref_model = None if isinstance(value, workarounds.HeldByPolicy) else value

    # ── data ──

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Leave data that is already token ids as it is; let TRL tokenise text."""
        if "prompt_ids" in (dataset.column_names or []):
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)

    # ── a run ──

    def create_accelerator_and_postprocess(self) -> None:
        """Set the precision of FSDP2 before TRL shards the second model (trl/trainer/dpo_trainer.py:961)."""
        super().create_accelerator_and_postprocess()
        keep_logps_fp32(self.accelerator)

    def restore_adapters(self) -> None:
        """Undo what the host did to the adapters after this trainer was built."""
        restore_adapter_dtype(self._attached)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Let the host's optimizer update fp32 master weights; called before FSDP2 shards what axolotl has cast."""
        if self.masters and self.accelerator.is_fsdp2:
            self._fp32_shards |= master_weights.widen(self.model)
        optimizer = super().create_optimizer(model)
        if self.masters:
            master_weights.add_master_weights(optimizer, self.model, LOG.warning)
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, or resume from a whole checkpoint that was made with the same base, reference and settings.

        Raises:
            CheckpointError: If the checkpoint is incomplete, damaged, not ours, or was made with something else.
        """
        reads, folder = self.accelerator.is_local_main_process, Path(self.args.output_dir)
        named = self.settings.resume_named
        found = checkpoint_to_resume(resume_from_checkpoint, named, folder, self.origin, reads)
        return super().train(resume_from_checkpoint=found, **kwargs)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        """Prepare the engine, then set what it does not: fp32 masters, the reference's digest and saved values."""
        partition_mapped(self.model, self.accelerator)
        prepared: tuple[Any, Any] = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is None:
            init_master_weights(self._attached)
        self._attached = {}
        if isinstance(self.model, PolicyReferenceModel) and self.model.has_reference:
            self.model.reference_digest = reference_digest(self.model)
        if resume_from_checkpoint is not None:
            resume.load_reference(self.reference.strategy, Path(resume_from_checkpoint))
            self.preference_step.step_zero_dtype = None
        return prepared

    def _run_epoch(self, **kwargs: Any) -> None:
        """Train an epoch, unless the run is at its last step already: transformers 5.16 to 5.20 would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    # ── the step ──

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-step, the one that TRL inherits from transformers.

        The host's trainer has one of its own up to axolotl 0.20, which ends with a garbage collection
        (core/trainers/dpo/trainer.py:100). tests/unit/host/test_workarounds.py says when it has another.

        A micro-batch of several packs has a forward and backward for each; gradients are exchanged with the last.
        """
        step = super(AxolotlDPOTrainer, self).training_step
        *others, last = self._packs(inputs)
        with without_exchange(self.accelerator, model) if others else nullcontext():
            losses = [step(model, pack, num_items_in_batch) for pack in others]
        return torch.stack([*losses, step(model, last, num_items_in_batch)]).sum()

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        if return_outputs:
            raise ConfigError("dpo_plugin does not return logits from evaluation. Remove compute_metrics.")
        return torch.stack([self._pack_loss(model, pack) for pack in self._packs(inputs)]).sum()

    def _pack_loss(self, model: Any, pack: dict[str, Any]) -> Tensor:
        batch, training = to_pair_batch(pack), self.model.training
        result = self.preference_step(model, batch, pack["counted"], training)
        if result.logps is not None:
            self.recorder.add(result.logps, batch, self.reference.fresh, training, result.losses)
        weight: float = pack["weight"]
        return result.loss * weight

    def _packs(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        return packs_of(self.accelerator, inputs, self.model.training)

    def cache_reference(self, inputs: dict[str, Any]) -> None:
        """Compute and cache the reference's log-probs of a collated micro-batch."""
        for pack in self._packs(self._prepare_inputs(inputs)):
            self.preference_step.reference_logps(self.model_wrapped, to_pair_batch(pack))

    # ── the log ──

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Evaluate, with our metrics under the prefix that is asked for."""
        batches.decide_layout(self)
        self._eval_prefix = metric_key_prefix
        metrics: dict[str, float] = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our metrics, averaged over all pairs of all ranks since the last line."""
        prefix = "" if self.model.training else f"{self._eval_prefix}_"
        since_start = self.is_in_train or self.state.global_step > 0
        logs.update(self.recorder.fields(self.model, prefix, self.state.global_step, since_start))
        super().log(logs, start_time)

    # ── what is saved, and loaded ──

    def _is_sharded(self) -> bool:
        return bool(self.accelerator.is_fsdp2) and isinstance(self.model, PolicyReferenceModel)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy with PEFT's keys, along with what it was trained with.

        transformers 5.16 to 5.20 gathers the whole base for it under FSDP2 and ZeRO-1 and -2; it saves no adapter where
        ``state_dict_type`` is not FULL_STATE_DICT or DeepSpeed's ``stage3_gather_16bit_weights_on_model_save`` is not
        set; and what it saves from DeepSpeed is rounded to bf16 (trainer.py:4057-4085).

        Raises:
            CheckpointError: If it cannot be written.
        """
        folder = Path(output_dir or self.args.output_dir)
        with resume.saving(folder, self.state.global_step):
            if isinstance(self.model, PolicyReferenceModel) and (self._is_sharded() or self.is_deepspeed_enabled):
                policy = gather_policy(self.model)
                if self.args.should_save:
                    self._save(output_dir, state_dict=policy)
            else:
                super().save_model(output_dir, _internal_call=_internal_call)
            if self.args.should_save:
                write_marker(folder, self.origin)
                if _internal_call:
                    resume.save_reference(self.reference.strategy, folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save weights in the dtype that they are computed in, not in that of FSDP2's master weights."""
        narrowed = state_dict and self._fp32_shards and master_weights.narrow(state_dict, self._fp32_shards)
        super()._save(output_dir, narrowed or state_dict)
        if narrowed:
            self.model.config.dtype = torch.bfloat16
            self.model.config.save_pretrained(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint and, last, the digests of its files; only then delete older ones."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with resume.saving(Path(self.args.output_dir), self.state.global_step):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            resume.complete_checkpoint(folder, self.origin, limit, self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save them with master weights, and without the host's copy of the adapter."""
        with workarounds.without_fsdp_model_file() if self._is_sharded() else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            master_weights.save_master_weights(self.model, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load them with master weights."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            master_weights.load_master_weights(self.model, Path(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Resume from the adapter file."""
        if self._is_sharded():
            load_policy(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the adapter file of the best checkpoint."""
        if self._is_sharded():
            load_policy(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write our card instead of TRL's, and which reference the adapter was trained against."""
        if self.is_world_process_zero():
            write_card(self)
            write_marker(Path(self.args.output_dir), self.origin)
