"""`PreferenceTrainer`: axolotl's DPO trainer with our adapters, reference, log-probs, losses and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from torch import Tensor, nn

from dpo_plugin.compute.batching import PairCollator, to_pair_batch
from dpo_plugin.compute.logps import pair_logps, run_model, total_loss
from dpo_plugin.compute.losses import LossOptions
from dpo_plugin.errors import ConfigError, ReferenceMismatchError
from dpo_plugin.host.log import LOG
from dpo_plugin.host.plugin import DPOPlugin
from dpo_plugin.model.adapters import PolicyReferenceModel, attach
from dpo_plugin.monitor.metrics import MeanMetrics
from dpo_plugin.registry import get_registry
from dpo_plugin.types import CompletionLogps, PairBatch, PairLogps

STEP_ZERO_TOLERANCE = 1e-4
"""Largest |reward| that policy = reference may show before the first step."""


class _HeldByPolicy:
    """Stands in for a reference model when the reference lives in the policy's own adapters."""


class PreferenceTrainer(AxolotlDPOTrainer):  # type: ignore[misc]
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
        if peft_config is not None:
            model = attach(base, self._settings.policy or peft_config, self._settings.reference)
        kwargs["data_collator"] = _collator(kwargs)
        super().__init__(*self._for_trl(model, ref_model), **kwargs)
        if isinstance(model, PolicyReferenceModel):
            model.train_only_policy()
            save_policy_instead_of_base(base, model)
        self._reference = self._settings.strategy(model, self.ref_model)
        registry = get_registry()
        weights = self.args.loss_weights or [1.0] * len(self.loss_types)
        self._losses = {
            name: (registry.losses.find(name, "dpo_loss_type"), weight)
            for name, weight in zip(self.loss_types, weights, strict=True)
        }
        self._loss_options = LossOptions(self.beta, self.label_smoothing or 0.0, self.args.discopop_tau)
        self._means = {mode: MeanMetrics(self._settings.metrics) for mode in ("train", "eval")}
        self._check_step_zero = self._reference.equals_policy_at_start()
        if self.accelerator.is_main_process:
            self._say_what_is_trained(model)

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

    def _say_what_is_trained(self, model: nn.Module) -> None:
        settings = self._settings
        fresh = "a fresh LoRA" if isinstance(model, PolicyReferenceModel) else "the base model"
        start = settings.policy.path if settings.policy else fresh
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        where = f" {settings.reference.path}" if settings.reference else ""
        LOG.info(
            f"dpo_plugin: policy starts from {start}, {trainable:,} trainable parameters; "
            f"reference: {settings.strategy_name}{where}; loss: {', '.join(self._losses)}, beta {self.beta}"
        )

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Leave data that is already token ids as it is; let TRL tokenise text."""
        if "prompt_ids" in (dataset.column_names or []):
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """(pairs,) fp32 nats of chosen and rejected, for TRL's ``precompute_ref_log_probs``."""
        chosen, rejected = self._reference.logps(model, to_pair_batch(inputs), self._forward).unbind(dim=1)
        return chosen, rejected

    def _forward(self, model: Any, batch: PairBatch) -> CompletionLogps:
        return run_model(model, batch, wpo=bool(self.use_weighting))

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        if return_outputs:
            raise ConfigError("dpo_plugin does not return logits from evaluation. Remove compute_metrics.")
        batch = to_pair_batch(inputs)
        policy = self._forward(model, batch)
        ref_logps = batch.ref_logps
        if ref_logps is None:
            ref_logps = self._reference.logps(model, batch, self._forward)
        logps = pair_logps(policy, ref_logps, self.beta, batch.sources)
        self._verify_step_zero(logps)
        self._means["train" if self.model.training else "eval"].update(logps)
        return total_loss(logps, self._losses, self._loss_options, policy.wpo_weights).mean()

    def _verify_step_zero(self, logps: PairLogps) -> None:
        """Stop if the policy is not the reference before the first step, though both start from the same adapter."""
        if not self._check_step_zero:
            return
        self._check_step_zero = False
        if self.state.global_step > 0 or not self.args.disable_dropout:
            return
        worst = torch.stack([logps.chosen_rewards, logps.rejected_rewards]).detach().abs().max().item()
        if not worst <= STEP_ZERO_TOLERANCE:
            raise ReferenceMismatchError(
                "before the first step policy and reference come from the same weights, so every reward must be 0, "
                f"but the largest is {worst:.3g} (tolerance {STEP_ZERO_TOLERANCE}). Something changes the model "
                "between the two forwards: another plugin, a patched kernel, or dropout. Remove it from the config."
            )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-step, without the garbage collection of axolotl 0.19 (core/trainers/dpo/trainer.py:100)."""
        return super(AxolotlDPOTrainer, self).training_step(*args, **kwargs)  # type: ignore[no-any-return]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our metrics, averaged over all pairs of all ranks since the last line."""
        mode = "train" if self.model.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        means = self._means[mode].result(lambda values: self.accelerator.reduce(values, reduction="sum"))
        logs.update({f"{prefix}{name}": value for name, value in means.items()})
        super().log(logs, start_time)


def _collator(kwargs: Mapping[str, Any]) -> PairCollator:
    """Our collator, which keeps sources, in place of TRL's or of the host's.

    The host's, for ``pad_to_multiple_of``, looks for ``*_input_ids``, which TRL 1.9 no longer makes
    (axolotl 0.19, utils/collators/dpo.py); tests/integration/test_data_runs.py holds the key.
    """
    multiple = getattr(kwargs.get("data_collator"), "pad_to_multiple_of", None) or kwargs["args"].pad_to_multiple_of
    return PairCollator(kwargs["processing_class"].pad_token_id, multiple)


def save_policy_instead_of_base(base: nn.Module, policy: PolicyReferenceModel) -> None:
    """Let the host's ``base.save_pretrained(output_dir)`` write the policy adapter.

    After saving the trainer's model, axolotl 0.19 saves the base that it loaded once more, adapters injected, as
    model.safetensors: 40 GB at 72B and of no use (train.py:406-410); on SIGINT it saves only that (:203).
    tests/integration/test_runs.py fails when the host stops doing so and this can go.
    """

    def save_pretrained(save_directory: str, *_: Any, **__: Any) -> None:
        policy.save_pretrained(save_directory)

    base.save_pretrained = save_pretrained  # type: ignore[assignment]
