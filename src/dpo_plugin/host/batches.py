"""What a trainer is made of: adapters, attention, layout of batches, the step, the cache of reference log-probs."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import ConcatDataset
from transformers import set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_plugin.compute import attention, batching, lm_head, logps
from dpo_plugin.compute.batching import PairCollator, find_row, row_name, sequences, to_pair_batch
from dpo_plugin.compute.layouts import Comparison, compare_layouts, pairs_to_compare, rounding, smallest_window
from dpo_plugin.compute.lm_head import ForwardOptions
from dpo_plugin.compute.losses import LossOptions
from dpo_plugin.compute.step import PreferenceStep
from dpo_plugin.engines.ranks import on_any_rank
from dpo_plugin.engines.sharded import gather_policy
from dpo_plugin.errors import ConfigError
from dpo_plugin.host.log import LOG
from dpo_plugin.host.settings import RunSettings
from dpo_plugin.host.workarounds import keep_nf4_as_packed
from dpo_plugin.metrics.adapter_norms import AdapterNorms
from dpo_plugin.metrics.pair import needed_by
from dpo_plugin.metrics.recorder import MetricRecorder
from dpo_plugin.model.adapters import PolicyReferenceModel, attach
from dpo_plugin.model.cache import (
    CachedReference,
    ReferenceLogpCache,
    cache_key,
    config_digest,
    rope_limit,
    weights_digest,
)
from dpo_plugin.model.finite import weights_not_finite
from dpo_plugin.model.references import ReferenceStrategy
from dpo_plugin.registry import get_registry
from dpo_plugin.types import PairBatch


def attach_adapters(settings: RunSettings, base: nn.Module, peft_config: Any, seed: int) -> nn.Module:
    """Attach policy and reference adapter to the base; in full fine-tuning, return it unchanged."""
    adapter = settings.policy or peft_config  # axolotl evaluate passes no peft_config
    if adapter is None:
        return base
    set_seed(seed)  # a fresh LoRA is the same on all ranks, however much each has drawn before
    model = attach(base, adapter, settings.reference.adapter)
    model.name_base(str(model.config.name_or_path), settings.revision)
    return model


def may_share_prefixes(settings: RunSettings, base: Any) -> bool:
    """Decide whether a flat row may be tried, and log why if not; `decide_layout` compares it with two rows.

    Raises:
        ConfigError: With ``prefix_sharing: true`` on a model that cannot.
    """
    why = settings.prefix_sharing_blocker or attention.prefix_sharing_blocker(base.config)
    if why is not None:
        _insist_or_say(settings, why)
    return why is None


def _insist_or_say(settings: RunSettings, why: str) -> None:
    if settings.config.compute.prefix_sharing is True:
        raise ConfigError(f"{why}, but `dpo_plugin.compute.prefix_sharing: true` asks for it. Write: auto")
    LOG.info(f"dpo_plugin: chosen and rejected are computed as two rows each, because {why}")


def decide_layout(trainer: Any) -> None:
    """Compare a flat row with two rows on a few pairs of the run, before the first forward; turn it off if they differ.

    All ranks must call. Without training, an engine that shards a model has not done so yet, and two rows are taken.

    Raises:
        ConfigError: With ``prefix_sharing: true`` where they differ.
        DataError: If two rows of a pair are longer than ``compute.max_tokens``.
    """
    collator: PairCollator = trainer.data_collator
    if not collator.flat or trainer.compared is not None:
        return
    data = [data for _, data in named_datasets(trainer) if len(data)]
    why: str | None = "there are no pairs to compare the layouts on"
    if not trainer.is_in_train and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        why = "nothing is compared for an evaluation alone where an engine shards the model"
    elif data:
        try:
            trainer.compared = _compare(trainer, ConcatDataset(data))
            why = trainer.compared.why_not
        except Exception as error:  # a model's own code, which may take neither our keywords nor our positions
            why = f"the model does not run a flat row ({type(error).__name__}: {str(error)[:200]})"
        differs = on_any_rank(trainer.accelerator, why is not None)
        why = why or ("another rank finds a difference" if differs else None)
    if why is None:
        LOG.info(f"dpo_plugin: chosen and rejected share their prefix; it moves log-probs by {trainer.compared}")
        return
    _insist_or_say(trainer.settings, why)
    collator.flat = False
    for model in filter(None, (trainer.model, trainer.ref_model)):
        attention.attend_to_rows(model)
    check_lengths(trainer)


def _compare(trainer: Any, data: Any) -> Comparison:
    window, longest = smallest_window(trainer.model.config), trainer.args.max_length
    pairs = pairs_to_compare(data, window if window and not (longest and longest <= window) else None)
    flat, rows = (replace(trainer.data_collator, flat=flat, max_tokens=None) for flat in (True, False))
    training = trainer.model.training
    trainer.model.eval()
    try:
        one, two = (to_pair_batch(trainer._prepare_inputs(collate(pairs))) for collate in (flat, rows))
        forward = partial(trainer.preference_step.forward_without_gradients, trainer.model_wrapped)
        head = trainer.model.get_output_embeddings()
        return compare_layouts(forward, head, one, two, rounding(trainer.settings.engine.dtype))
    finally:
        trainer.model.train(training)


def prepare_models(flat: bool, *models: Any) -> None:
    """Set the attention of the flat layout, and how 4-bit weights are read."""
    for model in filter(None, models):
        keep_nf4_as_packed(model)
        capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
        if capped and model.config._attn_implementation == "sdpa":
            LOG.warning_once(
                f"dpo_plugin: {model.config.model_type} caps its attention scores, which transformers' SDPA does not, "
                "so log-probs are not the model's. Write: attn_implementation: eager"
            )
        if flat:
            attention.attend_to_pairs(model)


def make_collator(settings: RunSettings, kwargs: dict[str, Any], flat: bool) -> PairCollator:
    """Make our collator, which keeps sources and row hashes, in place of TRL's or the host's.

    The host's, for ``pad_to_multiple_of``, looks for ``*_input_ids``, which TRL 1.9 to 1.14 does not make
    (axolotl 0.19 to 0.21, utils/collators/dpo.py:43); tests/integration/test_data_runs.py holds the key.
    """
    multiple = getattr(kwargs.get("data_collator"), "pad_to_multiple_of", None) or kwargs["args"].pad_to_multiple_of
    pad = kwargs["processing_class"].pad_token_id
    return PairCollator(pad, multiple, flat, settings.config.compute.max_tokens)


def make_reference(trainer: Any, config: Any, base: str) -> CachedReference:
    """Make the reference of a `PreferenceTrainer`, behind its cache, for a base of this config and digest."""
    settings, model = trainer.settings, trainer.model
    strategy = settings.reference.strategy(model, trainer.ref_model, settings.config.reference)
    if isinstance(model, PolicyReferenceModel):
        strategy.policy_values = partial(gather_policy, model)
    cache = open_cache(settings, strategy, base, config, partial(longest_row, trainer))
    tolerance = rounding(settings.engine.dtype)
    return CachedReference(strategy, cache, partial(on_any_rank, trainer.accelerator), tolerance, LOG.warning)


def make_recorder(trainer: Any) -> MetricRecorder:
    """Make what turns the step's log-probs into log lines, for a `PreferenceTrainer` whose reference is set up."""
    settings, same = trainer.settings, trainer.reference.strategy.equals_policy_at_start()
    norms = AdapterNorms(trainer.model, moving=settings.reference.strategy.moves)
    return MetricRecorder(trainer.accelerator, settings.metrics, get_registry().metrics.owner, norms, same)


def make_step(trainer: Any) -> PreferenceStep:
    """Make the step of a `PreferenceTrainer` whose reference is set up."""
    config, args = trainer.settings.config, trainer.args
    names, losses = args.loss_type, get_registry().losses
    weights = args.loss_weights or [1.0] * len(names)
    checked = trainer.reference.strategy.equals_policy_at_start() and args.disable_dropout
    routed = bool(config.loss.router_aux_loss_coef)
    if routed and not hasattr(trainer.model.config.get_text_config(), "output_router_logits"):
        raise ConfigError(
            f"`dpo_plugin.loss.router_aux_loss_coef: {config.loss.router_aux_loss_coef:g}` needs a mixture of experts "
            f"that returns its routers' loss; {trainer.model.config.model_type} does not. "
            "Write: router_aux_loss_coef: null"
        )
    return PreferenceStep(
        reference=trainer.reference,
        losses={name: losses.find(name, "dpo_loss_type") for name in names},
        weights=dict(zip(names, weights, strict=True)),
        loss_options=LossOptions(beta=args.beta, label_smoothing=args.label_smoothing or 0.0, **dict(config.loss)),
        forward_options=ForwardOptions(
            wpo=bool(args.use_weighting),
            ld_alpha=config.loss.ld_alpha,
            entropy="entropy" in needed_by(trainer.settings.metrics.values()),
            chunk=config.compute.logits_chunk,
            router_aux=routed,
        ),
        layers=checkpointed_layers(trainer.model),
        locate=partial(_locate_pair, trainer),
        owner=losses.owner,
        step_zero_dtype=trainer.settings.engine.dtype if checked else None,
    )


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """List the layers that support gradient checkpointing."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _locate_pair(trainer: Any, batch: PairBatch, pair: int) -> str:
    """Say at which step and row a log-probability is not finite, what causes it, and what to write."""
    found = ((name, find_row(data, batch.row_hashes[pair])) for name, data in named_datasets(trainer))
    row = next((f"{row} of the {name} data" for name, row in found if row), "a pair")
    cause = weights_not_finite(trainer.model, trainer.ref_model) or (
        "Look at that row with `axolotl dpo preview`; if it is as it should be, the model overflows. Write: "
        "bf16: true, or a smaller learning_rate"
    )
    return f"at step {trainer.state.global_step}, for {row}, source {batch.sources[pair]!r}. {cause}"


# ── the cache of reference log-probs ──


def open_cache(
    settings: RunSettings, strategy: ReferenceStrategy, base: str, config: Any, longest: Callable[[], int]
) -> ReferenceLogpCache | None:
    """Open the cache for this base (`base_identity`), reference, precision and code; None if nothing is cached.

    With ``precompute_ref_log_probs`` and ``cache: false`` it lives in memory. `longest` counts the tokens of the
    longest row, padding included.
    """
    folder = settings.reference.cache_dir
    if not strategy.cacheable() or (folder is None and not settings.precompute):
        return None
    limit = rope_limit(config)
    if limit is not None and longest() > limit:
        LOG.warning(
            "dpo_plugin: reference log-probs are not kept. This model's rotary frequencies depend on the longest row "
            f"of a batch as soon as it has more than {limit} tokens, and so do the log-probs of all rows in it. To "
            f"keep them, write: sequence_len: {limit}"
        )
        return None
    source = "".join(map(inspect.getsource, (attention, batching, lm_head, logps)))
    key = cache_key(
        base=base,
        numerics=settings.numerics,
        reference=[settings.reference.name, strategy.identity()],
        dtype=str(settings.engine.dtype),
        ld_alpha=settings.config.loss.ld_alpha,
        code=hashlib.sha256(source.encode()).hexdigest(),
    )
    return ReferenceLogpCache(folder / "reference_logps" if folder else None, key)


def base_identity(base: Any, settings: RunSettings) -> str:
    """Hash the base model as loaded: its config, and a local folder's weights or its name and commit on the hub.

    That experts are quantised, by axolotl and beside transformers, no config says.
    """
    folder = Path(str(base.config.name_or_path))
    commit = f"{base.config.name_or_path}@{getattr(base.config, '_commit_hash', None)}"
    noted = getattr(base, "weights_digest", None)  # beside the copy that it was loaded from
    weights = noted or (weights_digest(folder) if folder.is_dir() else commit)
    experts = {key: on for key, on in settings.numerics.items() if key == "quantize_moe_experts"}
    return cache_key(weights=weights, config=config_digest(base.config), **experts)


# ── data ──


def named_datasets(trainer: Any) -> Iterator[tuple[str, Any]]:
    """Yield the trainer's data sets, each with a name for messages."""
    if trainer.train_dataset is not None:
        yield "training", trainer.train_dataset
    evaluation = trainer.eval_dataset
    if isinstance(evaluation, dict):
        yield from ((f"evaluation ({name})", data) for name, data in evaluation.items())
    elif evaluation is not None:
        yield "evaluation", evaluation


def check_lengths(trainer: Any) -> None:
    """Check that no pair of the data is longer than ``compute.max_tokens``.

    Raises:
        DataError: Naming the row.
    """
    collator: PairCollator = trainer.data_collator
    if collator.max_tokens is None:
        return
    for name, data in named_datasets(trainer):
        for number, row in enumerate(data):
            collator.check_fits(row, f"{row_name(row, number)} of the {name} data")


def longest_row(trainer: Any) -> int:
    """Count the tokens of the longest row of any data set, padding included."""
    rows = (ids for _, data in named_datasets(trainer) for row in data for ids in sequences(row))
    multiple = trainer.data_collator.pad_to_multiple_of or 1
    return -(-max(map(len, rows), default=0) // multiple) * multiple
