"""`PreferenceTrainer`: axolotl's DPO trainer with our adapters, reference, log-probs, losses and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_plugin.compute.batching import find_row, sequences, to_pair_batch
from dpo_plugin.compute.checkpointing import without_checkpointing
from dpo_plugin.compute.dropout import disable_dropout
from dpo_plugin.compute.lm_head import ForwardOptions
from dpo_plugin.compute.logps import pair_logps, run_model, total_loss
from dpo_plugin.compute.losses import LossOptions
from dpo_plugin.compute.step_zero import largest_deviation
from dpo_plugin.engines.packs import packs_of, rows_that_count
from dpo_plugin.engines.sharded import OnAnyEngine, whole_policy
from dpo_plugin.errors import ConfigError, NotFiniteError, ReferenceMismatchError
from dpo_plugin.host.batches import (
    CheckpointLayers,
    check_lengths,
    make_collator,
    named_datasets,
    prepare_models,
    shares_prefixes,
)
from dpo_plugin.host.callbacks.health import HealthCallback
from dpo_plugin.host.callbacks.progress import Progress
from dpo_plugin.host.callbacks.reference import ReferenceCallback
from dpo_plugin.host.callbacks.samples import SamplesCallback
from dpo_plugin.host.log import LOG
from dpo_plugin.host.output_dir.card import model_card
from dpo_plugin.host.output_dir.checkpoints import write_marker
from dpo_plugin.host.output_dir.resume import ResumesWhole
from dpo_plugin.host.output_dir.saving import saving
from dpo_plugin.host.plugin import DPOPlugin
from dpo_plugin.host.reference_cache import base_identity, open_cache, rounding
from dpo_plugin.metrics.adapter_norms import AdapterNorms
from dpo_plugin.metrics.pair import needed_by
from dpo_plugin.metrics.recorder import MetricRecorder
from dpo_plugin.model.adapters import POLICY, PolicyReferenceModel, attach
from dpo_plugin.model.buffers import ComputedBuffers
from dpo_plugin.model.cached_reference import CachedReference
from dpo_plugin.model.finite import weights_not_finite
from dpo_plugin.registry import get_registry
from dpo_plugin.types import CompletionLogps, PairBatch, PairLogps


class _HeldByPolicy:
    """Stands in for a reference model when the reference lives in the policy's own adapters."""


class PreferenceTrainer(ResumesWhole, OnAnyEngine, MetricRecorder, AxolotlDPOTrainer):  # type: ignore[misc]
    """DPO with policy and reference on one base model.

    Args:
        model: The base model, without adapters.
        ref_model: The second model that the host loads for full fine-tuning; None with an adapter.
        peft_config: The host's LoRA settings, used when no ``lora_model_dir`` is given.
        kwargs: What `AxolotlDPOTrainer` takes.
    """

    def __init__(self, model: nn.Module, ref_model: nn.Module | None = None, *, peft_config: Any = None, **kwargs: Any):
        self._settings = DPOPlugin.active().run_settings()
        base = model
        adapter = self._settings.policy or peft_config  # axolotl evaluate passes no peft_config
        if adapter is not None:
            set_seed(kwargs["args"].seed)  # a fresh LoRA is the same on all ranks, however much each has drawn before
            model = attach(base, adapter, self._settings.reference.adapter)
            model.name_base(str(model.config.name_or_path), self._settings.revision)
        flat = shares_prefixes(self._settings, base)
        prepare_models(flat, base, ref_model)
        if kwargs["args"].disable_dropout:
            disable_dropout(model, ref_model)
        self._computed_buffers = [ComputedBuffers(one) for one in (model, ref_model) if one is not None]
        kwargs["data_collator"] = make_collator(self._settings, kwargs, flat)
        super().__init__(*self._for_trl(model, ref_model), **kwargs)
        if isinstance(model, PolicyReferenceModel):
            model.train_only_policy()
            save_policy_instead_of_base(base, model)
        self._adapter_norms = AdapterNorms(model, moving=not self._settings.reference.strategy.fixed)
        self._layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        self._be_ready_for_engine()
        self._set_up_losses()
        strategy = self._settings.reference.strategy(model, self.ref_model, self._settings.config.reference)
        if isinstance(model, PolicyReferenceModel):
            strategy.policy_values = partial(whole_policy, model)
        self._base = base_identity(base)
        cache = open_cache(self._settings, strategy, self._base, base.config, self._longest_row)
        self.reference = CachedReference(
            strategy, cache, self._on_any_rank, rounding(self._settings.engine.dtype), self._warn
        )
        check_lengths(self.data_collator, named_datasets(self))
        self.add_callback(ReferenceCallback(self))
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(Progress(bars=not self.args.disable_tqdm))
        if (samples := self._settings.config.samples) is not None:
            self.add_callback(SamplesCallback(self, samples))
        wanted = self._settings.config.compute.checkpoint_layers
        if wanted is not None and self.args.gradient_checkpointing:
            self.add_callback(CheckpointLayers(self, wanted))
        self.add_callback(HealthCallback(self, self._settings.health_checks, self._settings.config.report))
        self._set_up_metrics(self._settings.metrics, get_registry().metrics.owner, strategy.equals_policy_at_start())
        self._check_step_zero = strategy.equals_policy_at_start()
        if self.accelerator.is_main_process:
            self._log_setup(model)

    def _for_trl(self, model: nn.Module, ref_model: nn.Module | None) -> tuple[nn.Module, Any]:
        """Model and ref_model in a form that keeps TRL 1.9 from copying and casting our adapters.

        Given a PeftModel and no ref_model, TRL adds an adapter "ref", always a copy of "default"
        (trl/trainer/dpo_trainer.py:649); a stand-in, which the setter of `ref_model` takes off again, prevents it.
        It casts what is trainable on a quantised base to bf16 (:700), so nothing is trainable until it is done.
        Both are held by tests/integration/test_runs.py.
        """
        if not isinstance(model, PolicyReferenceModel):
            return model, ref_model
        model.train_only_policy(False)
        return model, _HeldByPolicy()

    @property
    def ref_model(self) -> nn.Module | None:
        """The second model, if there is one."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, value: Any) -> None:
        self._ref_model = None if isinstance(value, _HeldByPolicy) else value

    def _set_up_losses(self) -> None:
        losses = get_registry().losses
        weights = self.args.loss_weights or [1.0] * len(self.loss_types)
        self._losses = {
            name: (losses.find(name, "dpo_loss_type"), weight)
            for name, weight in zip(self.loss_types, weights, strict=True)
        }
        config = self._settings.config
        self._loss_options = LossOptions(
            beta=self.beta,
            label_smoothing=self.label_smoothing or 0.0,
            discopop_tau=config.loss.discopop_tau,
            f_divergence=config.loss.f_divergence,
            f_alpha=config.loss.f_alpha,
        )
        self._forward_options = ForwardOptions(
            wpo=bool(self.use_weighting),
            ld_alpha=config.loss.ld_alpha,
            entropy="entropy" in needed_by(self._settings.metrics.values()),
            chunk=config.compute.logits_chunk,
        )
        self._reference_options = replace(self._forward_options, wpo=False, entropy=False)

    def _log_setup(self, model: nn.Module) -> None:
        settings = self._settings
        fresh = "a fresh LoRA" if isinstance(model, PolicyReferenceModel) else "the base model"
        start = settings.policy.path if settings.policy else fresh
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        LOG.info(
            f"dpo_plugin: policy starts from {start}, {trainable:,} trainable parameters; "
            f"reference: {settings.reference}; loss: {', '.join(self._losses)}, beta {self.beta}"
        )
        if self.ref_model is not None:
            size = sum(p.numel() * p.element_size() for p in self.ref_model.parameters()) / 2**30
            LOG.info(f"dpo_plugin: the second model that is the reference takes {size:.2f} GiB")
        if (cache := self.reference.cache) is not None:
            damaged = f", {cache.damaged} damaged records left out" if cache.damaged else ""
            LOG.info(f"dpo_plugin: {len(cache)} reference log-probs found in {cache.folder}{damaged}")

    # ── data ──

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Leave data that is already token ids as it is; let TRL tokenise text."""
        if "prompt_ids" in (dataset.column_names or []):
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Leave the data as it is: `ReferenceCallback` fills the cache when the engine has prepared the model."""
        return dataset

    # ── the step ──

    def reference_logps(self, model: Any, inputs: Any) -> None:
        """Let the cache have the reference's log-probs of a collated micro-batch."""
        for pack in packs_of(self, inputs):
            self.reference.logps(model, to_pair_batch(pack), self.reference_forward)

    def _longest_row(self) -> int:
        """Tokens of the longest row of any data set, padding included."""
        rows = (ids for _, data in named_datasets(self) for row in data for ids in sequences(row))
        multiple = self.data_collator.pad_to_multiple_of or 1
        return -(-max(map(len, rows), default=0) // multiple) * multiple

    def _warn(self, message: str) -> None:
        if self.accelerator.is_main_process:
            LOG.warning(message)

    def reference_forward(self, model: Any, batch: PairBatch) -> CompletionLogps:
        """Run a model on a batch as the reference is run: without gradients, and what only the policy's step needs."""
        with torch.no_grad(), without_checkpointing(self._layers):
            return run_model(model, batch, self._reference_options)

    def _on_any_rank(self, condition: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return condition
        flag = torch.tensor([float(condition)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        if return_outputs:
            raise ConfigError("dpo_plugin does not return logits from evaluation. Remove compute_metrics.")
        if "packs" in inputs:
            return torch.stack([self._compute_loss(model, pack, False) for pack in packs_of(self, inputs)]).sum()
        batch = to_pair_batch(inputs)
        policy = run_model(model, batch, self._forward_options)
        anew = self._check_step_zero and self.model.training
        ref_logps = self.reference.logps(model, batch, self.reference_forward, anew)
        logps = pair_logps(policy, ref_logps, self.beta, batch.sources)
        self._check_finite(logps, batch)
        self._verify_step_zero(logps)
        counted = [n for n, place in enumerate(inputs["places"]) if place < rows_that_count(self)]
        if counted:
            self._means["train" if self.model.training else "eval"].update(logps.only(counted))
            if self.model.training:
                self._throughput.add(batch, self.reference.fresh)
        losses = total_loss(logps, self._losses, self._loss_options, policy.wpo_weights)
        loss = losses[counted].mean() if 0 < len(counted) < batch.num_pairs else losses.mean()
        return loss * inputs.get("weight", 1.0)

    def _check_finite(self, logps: PairLogps, batch: PairBatch) -> None:
        sides = {
            "policy's log-probability of chosen": logps.policy_chosen_logps,
            "policy's log-probability of rejected": logps.policy_rejected_logps,
            "reference's log-probability of chosen": logps.ref_chosen_logps,
            "reference's log-probability of rejected": logps.ref_rejected_logps,
        }
        finite = torch.isfinite(torch.stack(list(sides.values())).detach())
        if finite.all():
            return
        side, pair = (~finite).nonzero()[0].tolist()
        value = list(sides.values())[side][pair].item()
        found = ((name, find_row(data, batch.row_hashes[pair])) for name, data in named_datasets(self))
        where = next((f"{row} of the {name} data" for name, row in found if row), "a pair")
        cause = weights_not_finite(self.model, self.ref_model) or (
            "Look at that row with `axolotl dpo preview`; if it is as it should be, the model overflows. Write: "
            "bf16: true, or a smaller learning_rate"
        )
        raise NotFiniteError(
            f"the {list(sides)[side]} is {value} at step {self.state.global_step}, for {where}, source "
            f"{batch.sources[pair]!r}. {cause}"
        )

    def _verify_step_zero(self, logps: PairLogps) -> None:
        """Stop if the policy is not the reference before the first step, though both start from the same weights.

        Kept log-probs come from batches of another shape, which in bf16 moves them by more than the tolerance, so the
        reference is run anew for this batch. What an evaluation computes before is not what is trained on.
        """
        if not (self._check_step_zero and self.model.training and self.reference.fresh):
            return
        self._check_step_zero = False
        if self.state.global_step > 0 or not self.args.disable_dropout:
            return
        worst = largest_deviation(logps, self._settings.engine.dtype)
        if not worst.explained:
            raise ReferenceMismatchError(
                "before the first step policy and reference come from the same weights, so every reward must be 0, "
                f"but the largest is {self.beta * worst.nats:.3g}: {worst.nats:.3g} nats over {worst.tokens} tokens, "
                f"where rounding explains {worst.allowed:.2g}. Something changes the model between the two forwards: "
                "another plugin, a patched kernel, or dropout. Remove it from the config."
            )

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-step, without the garbage collection of axolotl 0.19 (core/trainers/dpo/trainer.py:100).

        A micro-batch of several packs has a forward and backward for each; gradients are exchanged with the last.
        """
        step = super(AxolotlDPOTrainer, self).training_step
        if "packs" not in inputs:
            return step(model, inputs, num_items_in_batch)  # type: ignore[no-any-return]
        packs = packs_of(self, inputs)
        with self._without_exchange(model):
            losses = [step(model, pack, num_items_in_batch) for pack in packs[:-1]]
        return torch.stack([*losses, step(model, packs[-1], num_items_in_batch)]).sum()

    @contextmanager
    def _without_exchange(self, model: nn.Module) -> Iterator[None]:
        """Let backward neither reduce gradients over ranks nor, under DeepSpeed, step the optimizer."""
        if not self.is_deepspeed_enabled:
            with self.accelerator.no_sync(model):
                yield
            return
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            yield
        finally:
            state._set_sync_gradients(before)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write our card instead of TRL's, and which reference the adapter beside it was trained against."""
        if not self.is_world_process_zero():
            return
        output_dir, settings = Path(self.args.output_dir), self._settings
        adapter = isinstance(self.model, PolicyReferenceModel)
        digest = f"sha256 {self.model.digests[POLICY]}" if adapter and settings.policy else "none"
        facts = {
            "policy starts from": f"`{settings.policy.path}`, {digest}" if settings.policy else "the base model",
            "reference": " ".join(self.origin.reference.values()),
            "loss": ", ".join(f"{name} × {weight:g}" for name, (_, weight) in self._losses.items()),
            "beta": self.beta,
            "learning rate": self.args.learning_rate,
            "steps": self.state.global_step,
        }
        base = str(self.model.config.name_or_path)
        text = model_card(output_dir, base, facts, self.state.log_history, adapter)
        (output_dir / "README.md").write_text(text, encoding="utf-8")
        write_marker(output_dir, self.origin)


def save_policy_instead_of_base(base: nn.Module, policy: PolicyReferenceModel) -> None:
    """Let the host's ``base.save_pretrained(output_dir)`` write the policy adapter.

    After saving the trainer's model, axolotl 0.19 saves the base that it loaded once more, adapters injected, as
    model.safetensors: 40 GB at 72B and of no use (train.py:406-410); on SIGINT it saves only that (:203).
    tests/integration/test_runs.py fails when the host stops doing so and this can go.
    """

    def save_pretrained(save_directory: str, *_: Any, **__: Any) -> None:
        with saving(Path(save_directory)):
            policy.save_pretrained(save_directory)

    base.save_pretrained = save_pretrained  # type: ignore[assignment]
