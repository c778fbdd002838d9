"""Bytes of a micro-batch's activations, from the model's configuration alone; no weight is read, nothing is allocated.

They are not estimated: the real forward, reference forward, loss and backward run on fake tensors, which have a shape
and no data, while every live storage is added up. Layers are alike, so two depths are enough.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import statistics
import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_plugin.compute import attention
from dpo_plugin.compute.batching import PairCollator, to_pair_batch
from dpo_plugin.compute.lm_head import ForwardOptions, assume_logits_from_head
from dpo_plugin.compute.logps import run_model
from dpo_plugin.compute.losses import LossOptions, sigmoid
from dpo_plugin.compute.step import score_pairs
from dpo_plugin.errors import ConfigError
from dpo_plugin.model.adapters import POLICY, REFERENCE, PolicyReferenceModel
from dpo_plugin.plan.sizes import Sizes, check_targets, count, on_meta, quantisable
from dpo_plugin.types import CompletionLogps, PairBatch

DEPTHS = (2, 3)
"""Layers of the models that are run on fake tensors; the difference is what a layer adds."""


@dataclass(frozen=True)
class Step:
    """What the activations of one micro-batch depend on, besides the model.

    Attributes:
        pairs: Pairs in a forward.
        length: Most tokens of a prompt with its completion.
        checkpointed: Whether decoder layers keep their input alone and run again in backward.
        attention: `dpo_plugin.compute.attention.NAME` for the flat layout; otherwise that of two rows per pair.
        autocast: Whether the forward runs under autocast to bf16, as without DeepSpeed.
        fp32_adapters: Whether adapters enter the forward in fp32, as on one GPU and DDP.
        fp32_others: Whether embeddings, norms and head are fp32 on a base of bf16.
        chunk: Completion tokens whose logits are held at a time; None for the default.
    """

    pairs: int
    length: int
    checkpointed: bool
    attention: str
    autocast: bool = False
    fp32_adapters: bool = False
    fp32_others: bool = False
    chunk: int | None = None


@dataclass(frozen=True)
class Activations:
    """Bytes above parameters, gradients and optimizer states.

    Attributes:
        kept: What the policy's forward keeps for backward, with one hidden row per completion token.
        forward: The most that policy forward, scoring and reference forward take above ``kept``.
        backward: The most that backward takes above ``kept``.
        loss: The most that scoring takes above what lives when the head is entered; within ``kept`` and ``forward``.
    """

    kept: int
    forward: int
    backward: int
    loss: int


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make while they live; existing ones do not count."""

    def __init__(self, before: Iterable[Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages of its results."""
        if func is torch.ops.prim.device.default:  # more than half of all calls
            return args[0].device
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def restart(self) -> int:
        """Return the peak so far and begin a new one."""
        before, self.peak = self.peak, self.live
        return before


@dataclass
class PlannedModel:
    """A model to plan for; the arguments are those of `on_meta` and `count`."""

    config: Any
    adapters: Mapping[str, LoraConfig]
    dtype: torch.dtype
    trust: bool = False
    four_bit_experts: bool = False
    sizes: Sizes = field(init=False)
    _known: dict[tuple[Step, int], Activations] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        base = on_meta(self.config, {}, self.dtype, self.trust)
        for settings in self.adapters.values():
            check_targets(settings, base)
        model = on_meta(self.config, self.adapters, self.dtype, self.trust) if self.adapters else base
        self.sizes = count(base, model, self.four_bit_experts)

    def activations(self, step: Step, layers: int | None = None) -> Activations:
        """Bytes of a step, extrapolated from `DEPTHS` to all layers of the model, or to ``layers``."""
        few, more = (dataclasses.astuple(self.at_depth(step, depth)) for depth in DEPTHS)
        further = (self.sizes.layers if layers is None else layers) - DEPTHS[0]
        return Activations(*(a + further * (b - a) for a, b in zip(few, more, strict=True)))

    def at_depth(self, step: Step, layers: int) -> Activations:
        """Bytes of a step of the same model cut to ``layers`` layers, run on fake tensors.

        Raises:
            ConfigError: If torch has no fake form of an operation, as of the matrix product of experts in fp32.
        """
        if (step, layers) not in self._known:
            config, adapters = copy.deepcopy((self.config, dict(self.adapters)))
            _cut(config.get_text_config(), layers)  # of a base that sees its decoder; otherwise the config itself
            for settings in adapters.values():
                settings.layers_to_transform = None
                names = settings.target_parameters or ()
                settings.target_parameters = [re.sub(r".*\blayers\.\d+\.", "", name) for name in names]
            model = on_meta(config, adapters, self.dtype, self.trust)
            try:
                self._known[step, layers] = run_on_fakes(model, step)
            except RuntimeError as error:
                if self.dtype == torch.bfloat16:
                    raise
                raise ConfigError(
                    f"a step of a {config.model_type} model in {self.dtype} cannot be planned: {str(error)[:200]} "
                    "Write: bf16: true"
                ) from error
        return self._known[step, layers]


def _cut(decoder: Any, layers: int) -> None:
    """Leave a decoder's config so many layers: where they differ in kind, the last as it is, and one of each kind."""
    if getattr(decoder, "cross_attention_layers", None):  # Mllama's, at places of their own
        return
    decoder.num_hidden_layers = layers
    kinds = vars(decoder).get("layer_types")  # not Jamba's, which follow from other keys
    if not kinds:
        return
    if getattr(decoder, "is_heterogeneous", False):  # other settings belong to each place
        decoder.layer_types = kinds[:layers]
        return
    from_last = [*dict.fromkeys(reversed(kinds)), *[statistics.mode(kinds)] * layers]
    decoder.layer_types = from_last[:layers][::-1]


def run_on_fakes(model: Any, step: Step) -> Activations:
    """Run policy forward, reference forward, loss and backward of one micro-batch on fake tensors.

    Gradients exist beforehand, as from the second micro-step on, so that only what comes and goes is counted. The
    model is one of `on_meta`, and its parameters are replaced.
    """
    base = model.get_base_model() if isinstance(model, PolicyReferenceModel) else model
    if step.attention == attention.NAME:
        attention.attend_to_pairs(base)
    else:
        base.set_attn_implementation(step.attention)
    assume_logits_from_head(base)
    if step.checkpointed:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    fake = FakeTensorMode()
    batch = _longest_batch(step, fake)
    with fake:
        _fill(model.train(), base, step)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        marks: list[int] = []
        with LiveBytes([*model.parameters(), *model.buffers(), *gradients]) as seen:
            mark = base.get_output_embeddings().register_forward_pre_hook(
                lambda *_: marks.extend([seen.live, seen.restart()])
            )

            def reference(model: Any, batch: PairBatch) -> Tensor:
                mark.remove()
                marks.extend([seen.live, seen.peak])
                with torch.no_grad(), _reference(model):
                    return torch.stack(forward(model, batch).sums.chunk(2), dim=1)

            forward = partial(_forward, step=step)
            logps, _ = score_pairs(model, batch, forward, reference, beta=0.1)
            before_head, at_head, kept, scored = marks
            highest = max(at_head, seen.restart())
            sigmoid(logps, LossOptions(beta=0.1)).mean().backward()  # type: ignore[no-untyped-call]
    return Activations(kept, highest - kept, seen.peak - kept, scored - before_head)


def _fill(model: Any, base: Any, step: Step) -> None:
    """Give parameters fake tensors of their dtype in the forward, and gradients to the trainable ones."""
    linear = {id(module.weight) for module in quantisable(base)}
    dtype = next(base.parameters()).dtype
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        adapter = f".{POLICY}." in f"{name}." or f".{REFERENCE}." in f"{name}."
        for key, old in module._parameters.items():
            if old is not None and id(old) not in made:
                wide = step.fp32_adapters if adapter else step.fp32_others and id(old) not in linear
                values = torch.empty(old.shape, dtype=torch.float32 if wide else dtype)
                made[id(old)] = nn.Parameter(values, requires_grad=old.requires_grad)
                made[id(old)].grad = torch.empty_like(values) if old.requires_grad else None
            module._parameters[key] = None if old is None else made[id(old)]
        for key, old in module._buffers.items():
            module._buffers[key] = None if old is None else torch.empty(old.shape, dtype=old.dtype)


def _longest_batch(step: Step, fake: FakeTensorMode) -> PairBatch:
    """Make pairs that share one token: 2 × ``length`` each, nearly all completion, the most in either layout."""
    sides = {"chosen_ids": [1] * (step.length - 1), "rejected_ids": [2] * (step.length - 1)}
    batch = to_pair_batch(
        PairCollator(0, flat=step.attention == attention.NAME)([{"prompt_ids": [0], **sides}] * step.pairs)
    )
    fields: dict[str, Any] = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    faked = {name: fake.from_tensor(value) for name, value in fields.items() if isinstance(value, Tensor)}
    return PairBatch(**{**fields, **faked, "attention_mask": None})


def _reference(model: Any) -> Any:
    if not isinstance(model, PolicyReferenceModel):
        return nullcontext()  # a second model of the same shape
    return model.reference_active() if model.has_reference else model.adapters_off()


def _forward(model: Any, batch: PairBatch, step: Step) -> CompletionLogps:
    options = ForwardOptions(chunk=step.chunk)
    with torch.autocast("cpu", torch.bfloat16, enabled=step.autocast):
        return run_model(model, batch, options)
